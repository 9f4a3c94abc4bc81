"""Every snippet of the page on other people's loops runs as it stands there."""

import copy
import importlib
import re
import warnings

import pytest
import torch

import l2e
from tests.distributed.processes import run_on_processes
from tests.launch.running import ROOT

TEXT = (ROOT / "docs" / "how_to" / "use_in_your_model.md").read_text()
SNIPPETS = dict(re.findall(r"```python (\w+)\n(.*?)```", TEXT, re.DOTALL))
LIBRARIES = {"trainer": "transformers"} | {n: n for n in ("accelerate", "lightning", "peft")}
DISTRIBUTED = ("ddp", "fsdp")


def run(name, folder):
    """Executes a snippet with a small GPT-2, its batches and what its loop needs."""
    import transformers

    settings = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=24, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(settings).train()
    tokens = torch.randint(1, 64, (6, 2, 16))
    names = {
        "l2e": l2e,
        "torch": torch,
        "copy": copy,
        "folder": folder,
        "model": model,
        "config": l2e.L2EConfig(late_start_step=2, layers="all"),
        "batches": [{"input_ids": ids, "labels": ids} for ids in tokens],
        "dataset": [{"input_ids": ids, "labels": ids} for ids in tokens.flatten(0, 1)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    if library := LIBRARIES.get(name):
        names[library] = importlib.import_module(library)
    if name == "trainer":
        names["arguments"] = transformers.TrainingArguments(
            str(folder), max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="l2e")
        exec(SNIPPETS[name], names)
    handle = names.get("handle") or names["trainer"].lightning_module.handle
    return handle.controller.phase.step


def run_all(names, folder):
    return [run(name, folder) for name in names]


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name not in DISTRIBUTED])
@pytest.mark.filterwarnings("ignore")
def test_snippet_runs(name, tmp_path):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    assert run(name, tmp_path) > 0


def test_snippets_of_several_processes_run(tmp_path):
    for steps in run_on_processes(run_all, 2, tmp_path, DISTRIBUTED, tmp_path):
        assert steps == [6, 6]
