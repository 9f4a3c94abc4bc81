"""Which GPU a process takes; who tells that the memory is too small."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from configs.schema import Config
from launch.engine import hardware
from launch.engine.groups import exported
from launch.engine.joining import Joined
from launch.engine.processes import Process


@pytest.mark.parametrize(
    ("local_rank", "visible", "taken"), [(0, 1, 0), (3, 8, 3), (7, 8, 7), (5, 1, 0)]
)
def test_a_task_that_sees_its_own_gpu_alone_takes_it(local_rank, visible, taken):
    assert hardware.gpu_of(local_rank, visible) == taken


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match=r"process 4 \(from 0\).* 4 GPUs"):
        hardware.gpu_of(4, 4)


@pytest.fixture
def one_gpu(monkeypatch):
    """Two processes of one host that see a GPU each; returns (rank, its id) -> the GPU taken."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    store = dist.HashStore()

    def take(rank: int, uuid: str) -> int:
        properties = SimpleNamespace(uuid=uuid, name="NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        process = Process(rank, 2, rank, 2, "torchrun", "one", 1)
        return hardware.take_gpu(Joined(process, store, ["one", "one"], {}))

    return take


def test_two_processes_with_one_gpu_are_refused(one_gpu):
    assert one_gpu(0, "a") == 0
    assert one_gpu(0, "a") == 0  # the same process, once more
    with pytest.raises(ValueError, match="ranks 0 and 1 have one GPU, NVIDIA H100"):
        one_gpu(1, "a")


def test_tasks_that_see_a_gpu_of_their_own_are_told_its_number(one_gpu):
    """DeepSpeed takes LOCAL_RANK for the number of a GPU."""
    assert one_gpu(0, "a") == one_gpu(1, "b") == 0
    process = Process(1, 2, 1, 2, "srun", "one", 1)
    with exported(process, gpu=0):
        assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("1", "0")
    with exported(process, gpu=None):
        assert os.environ["LOCAL_RANK"] == "1"


def test_one_rank_of_each_host_tells_the_plan_and_what_would_help():
    shape = {"num_layers": 200, "hidden_size": 2**15, "num_attention_heads": 128}
    config = Config.model_validate({"model": shape, "train": {"dtype": "fp32"}})
    store, hosts = dist.HashStore(), ["one", "one", "two", "two"]
    told = []
    for rank in range(4):
        joined = Joined(Process(rank, 4, rank % 2, 2, "ranks", "one", 1), store, hosts, {})
        with pytest.raises(ValueError, match="weights, gradients and optimizer take") as refused:
            hardware.refuse_beyond_memory(config, joined)
        told.append(str(refused.value))
        assert "another rank of this host" in hardware.in_words(MemoryError(), config, joined)
    assert ["what would help, the cheapest" in text for text in told] == [True, False] * 2
    assert "another rank of this host says what would help" in told[1]
