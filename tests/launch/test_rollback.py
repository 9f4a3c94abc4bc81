"""A batch that makes no finite gradient: the run goes back and past it."""

import json
from pathlib import Path

from tests.launch import fleet
from tests.launch.running import ROOT, python

# The eighth batch that this process reads is poison, whenever it comes up.
POISONED = """
import sys
sys.path[0] = {root!r}
sys.argv = {arguments!r}
from launch.engine.engine import Engine
from launch import cli, pretrain

split, seen, poison = Engine.split, [], []

def poisoned(engine, batch):
    seen.append(batch)
    if len(seen) == 9:  # after seven steps and a validation
        poison.append(batch)
    tokens, labels = split(engine, batch)
    if poison and batch.equal(poison[0]) and engine.model.training:
        def spoil(gradient):
            hook.remove()
            return gradient * float("nan")

        hook = engine.model.embed_out.weight.register_hook(spoil)
    return tokens, labels

Engine.split = poisoned
cli.run_verb(pretrain.main)
"""


def test_a_run_goes_back_and_past_a_bad_batch(tmp_path: Path) -> None:
    config = fleet.write_config(
        tmp_path, train={"steps": 15, "micro_batch_size": 4, "on_nonfinite": "rollback"}
    )
    run = tmp_path / "run"
    arguments = ["launch/pretrain.py", "--config", str(config), "--run-dir", str(run)]
    script = tmp_path / "poisoned.py"
    script.write_text(POISONED.format(root=str(ROOT), arguments=arguments))
    done = python(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("its update was not made: back to") == 1
    assert "step_0000005" in done.stdout.split("back to")[1].splitlines()[0]
    assert sorted(fleet.losses(run)) == list(range(1, 16))
    assert all(loss is not None for loss in fleet.losses(run).values())
    # Steps 6 to 8 were made with the samples after step 8: three steps' data were passed over.
    state = json.loads((run / "checkpoints" / "step_0000015" / "state.json").read_text())
    assert state["samples"] == (15 + 3) * 4
