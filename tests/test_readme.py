"""Every command of the README is one that works: run here, or run by the tests named below."""

import re
import shlex
from pathlib import Path

import pytest

from tests.launch.running import ROOT, succeeds

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line]
TRAINING = sorted({command for command in COMMANDS if "launch/pretrain.py" in command})
# Run by CI itself (make), or needing a cluster's own programs; their files are parsed by tests.
ELSEWHERE = ("make ", "sbatch ", "kubectl ", "pip install .")


def test_nothing_in_the_readme_is_left_out() -> None:
    for command in COMMANDS:
        assert command in TRAINING or command.startswith(ELSEWHERE), command


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_are_valid(command: str) -> None:
    words = shlex.split(command)
    arguments = words[words.index("launch/pretrain.py") :]
    if "--help-config" not in arguments:
        arguments.append("--dry-run")
    succeeds(*arguments)


@pytest.mark.parametrize("verb", re.findall(r"\| `(launch/\w+\.py)` \|", TEXT))
def test_every_verb_explains_itself(verb: str) -> None:
    done = succeeds("-X", "importtime", verb, "--help")
    assert "usage:" in done.stdout
    assert f"launch/{Path(verb).name}" in done.stdout, "an example is missing"
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert "torch" not in imported, "help has to wait for torch"


def test_files_that_the_commands_name_exist() -> None:
    for name in re.findall(r"(?:launch|configs)/[\w./-]+\.\w+|launch/cluster/hostfile", TEXT):
        assert (ROOT / name).exists(), name


def test_the_python_snippet_runs() -> None:
    [snippet] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = surroundings()
    exec(snippet, names)
    assert names["loss"].requires_grad


def surroundings() -> dict:
    """A small GPT-2 and a batch, as the snippet's user would have them."""
    import torch

    from tests.tiny_models import gpt2

    tokens = torch.randint(0, 64, (2, 16))
    return {
        "model": gpt2(vocab_size=64),
        "batch": {"input_ids": tokens, "labels": tokens},
    }
