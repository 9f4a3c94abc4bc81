"""A batch that makes no finite gradient, or a loss that jumps: the run goes back and past it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import write_tokens
from tests.launch import fleet
from tests.launch.running import ROOT, succeeds

# The batch that this process reads as number NTH is poison, whenever it comes up.
POISONED = """
import sys
sys.path[0] = {root!r}
sys.argv = {arguments!r}
from l2e.layer import L2ELayer
from launch.engine.engine import Engine
from launch import cli, pretrain

split, seen, poison = Engine.split, [], []

def bad_gradient(engine, labels):
    def spoil(gradient):
        hook.remove()
        return gradient * float("nan")

    hook = engine.model.embed_out.weight.register_hook(spoil)
    return labels

def bad_activations(engine, labels):
    def spoil(layer, inputs):
        hook.remove()
        return (inputs[0] * float("nan"), *inputs[1:])

    layers = (module for module in engine.model.modules() if isinstance(module, L2ELayer))
    hook = next(layers).register_forward_pre_hook(spoil)
    return labels

def bad_labels(engine, labels):
    return (labels + 128) % 256

def poisoned(engine, batch):
    seen.append(batch)
    if len(seen) == {nth}:
        poison.append(batch)
    tokens, labels = split(engine, batch)
    if poison and batch.equal(poison[0]) and engine.model.training:
        labels = {kind}(engine, labels)
    return tokens, labels

Engine.split = poisoned
cli.run_verb(pretrain.main)
"""


def run_poisoned(folder: Path, kind: str, nth: int, **sections: dict) -> tuple[Path, str]:
    """The folder and the output of a run whose batch `nth` is spoilt by the function `kind`."""
    config = fleet.write_config(folder, **sections)
    run = folder / "run"
    arguments = ["launch/pretrain.py", "--config", str(config), "--run-dir", str(run)]
    script = folder / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT), arguments=arguments, nth=nth, kind=kind))
    return run, succeeds(script).stdout


def samples_read(run: Path, step: int) -> int:
    state = json.loads((run / "checkpoints" / f"step_{step:07d}" / "state.json").read_text())
    return state["samples"]


@pytest.mark.parametrize("kind", ["bad_gradient", "bad_activations"])
def test_a_run_goes_back_and_past_a_bad_batch(tmp_path: Path, kind: str) -> None:
    """After seven steps and a validation."""
    train = {"steps": 15, "micro_batch_size": 4, "on_nonfinite": "rollback"}
    run, told = run_poisoned(tmp_path, kind, 9, train=train)
    layers = " (NaN or Inf among the activations of blocks 0, 1)" * (kind == "bad_activations")
    assert told.count(f"its update was not made{layers}: back to") == 1
    assert "step_0000005" in told.split("back to")[1].splitlines()[0]
    assert sorted(fleet.losses(run)) == list(range(1, 16))
    assert all(loss is not None for loss in fleet.losses(run).values())
    # Steps 6 to 8 were made with the samples after step 8: three steps' data were passed over.
    assert samples_read(run, 15) == (15 + 3) * 4


def test_a_run_goes_back_and_past_a_batch_whose_loss_jumps(tmp_path: Path) -> None:
    """A language of sixteen words in one order is soon learnt; one batch's labels are wrong."""
    random = np.random.default_rng(0)
    starts, lengths = random.integers(0, 16, 2000), random.integers(20, 60, 2000)
    documents = [np.arange(a, a + n) % 16 for a, n in zip(starts, lengths, strict=True)]
    prefix = write_tokens(tmp_path / "words", documents)
    run, told = run_poisoned(
        tmp_path,
        "bad_labels",
        74,  # after 72 steps and a validation
        data={"path": prefix, "validation_path": str(tmp_path / "tokens")},
        train={"steps": 80, "micro_batch_size": 4, "on_spike": "rollback"},
    )
    assert told.count("the loss jumped at step 73:") == 1
    line = next(line for line in told.splitlines() if "the loss jumped" in line)
    assert "samples 288 to 291" in line
    assert "step_0000070" in line.split("back to")[1]
    losses = fleet.losses(run)
    assert sorted(losses) == list(range(1, 81))
    assert losses[73] < 1
    assert samples_read(run, 80) == (80 + 3) * 4
