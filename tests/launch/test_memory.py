"""Memory that runs out in a run: the plan by part and what would help, not a traceback."""

from pathlib import Path

import pytest

from tests.launch import fleet
from tests.launch.running import ROOT, refused

LIMIT = 12 * 2**30  # bytes of addresses, of which the libraries take several


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    train = {"steps": 5, "micro_batch_size": 4, "global_batch_size": 8}
    return fleet.write_config(tmp_path_factory.mktemp("memory"), train=train)


def check(output: str, whose: str) -> None:
    assert f"error: {whose} memory is exhausted" in output
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert f"{part} " in output
    assert output.count("time a step") + output.count("another run") == 3


def test_the_hosts_memory_is_exhausted(config: Path, tmp_path: Path) -> None:
    """The kernel refuses a process more than its limit: here the first activations, 16 GiB."""
    wide = {"train.micro_batch_size": 2**15, "train.global_batch_size": 2**15}
    wide["data.sequence_length"] = 256
    wide["model.hidden_size"] = 512
    run = ("--config", config, "--run-dir", tmp_path / "run")
    told = refused(fleet.VERB, *run, *fleet.words(wide), memory=LIMIT)
    check(told, "host")
    assert "train.micro_batch_size=16384" in told


# What a GPU's allocator raises, in the backward pass of the third step.
EXHAUSTED = """
import sys
sys.path[0] = {root!r}
sys.argv = {arguments!r}
import torch
from launch.engine.engine import WholeModelEngine
from launch import cli, pretrain

step, seen = WholeModelEngine.forward_backward_step, []

def exhausted(engine, batches):
    seen.append(1)
    if len(seen) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    return step(engine, batches)

WholeModelEngine.forward_backward_step = exhausted
torch.cuda.get_device_name = lambda *_: "NVIDIA H100"
cli.run_verb(pretrain.main)
"""


def test_a_gpus_memory_is_exhausted(config: Path, tmp_path: Path) -> None:
    arguments = ["launch/pretrain.py", "--config", str(config), "--run-dir", str(tmp_path / "run")]
    script = tmp_path / "exhausted.py"
    script.write_text(EXHAUSTED.format(root=str(ROOT), arguments=arguments))
    told = refused(script)
    check(told, "GPU")
    assert "NVIDIA H100" in told
    assert "Tried to allocate 2.00 GiB" in told


def test_a_model_that_is_too_large_is_refused_before_it_is_made(config: Path, tmp_path) -> None:
    large = {"model.hidden_size": 2**15, "model.num_layers": 200}
    told = refused(fleet.VERB, "--config", config, "--run-dir", tmp_path, *fleet.words(large))
    assert "weights, gradients and optimizer take" in told
    assert "this machine has" in told
    assert "exhausted" not in told
