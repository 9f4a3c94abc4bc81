"""Which GPU a process takes."""

import pytest

from launch.engine import hardware


@pytest.mark.parametrize(
    ("local_rank", "visible", "taken"), [(0, 1, 0), (3, 8, 3), (7, 8, 7), (5, 1, 0)]
)
def test_a_task_that_sees_its_own_gpu_alone_takes_it(local_rank, visible, taken):
    assert hardware.gpu_of(local_rank, visible) == taken


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match=r"process 4 \(from 0\).* 4 GPUs"):
        hardware.gpu_of(4, 4)
