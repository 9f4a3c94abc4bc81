"""Rank discovery under every launcher, from the variables each is documented to set."""

import os

import pytest

from launch.engine.processes import find, process_group


def test_alone() -> None:
    process = find({})
    assert (process.rank, process.world_size, process.launcher) == (0, 1, "alone")


@pytest.mark.parametrize(
    ("launcher", "size_variable"), [("torchrun", "LOCAL_WORLD_SIZE"), ("deepspeed", "LOCAL_SIZE")]
)
def test_torchrun_and_deepspeed(launcher: str, size_variable: str) -> None:
    environment = {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        size_variable: "8",
        "MASTER_ADDR": "node-1",
        "MASTER_PORT": "29400",
    }
    process = find(environment)
    assert (process.rank, process.world_size) == (9, 16)
    assert (process.local_rank, process.local_size, process.launcher) == (1, 8, launcher)
    assert (process.address, process.port) == ("node-1", 29400)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-006,009]", "gpu003"), ("alpha,beta", "alpha"), ("one", "one"), ("a[7,9]b", "a7")],
)
def test_srun(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    environment = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "123456",
    }
    process = find(environment)
    assert (process.rank, process.world_size) == (5, 8)
    assert (process.local_rank, process.local_size) == (1, 4)
    assert process.address == first
    assert process.port == find(environment | {"SLURM_PROCID": "0"}).port
    assert 20000 <= process.port < 40000


def test_inside_an_allocation_without_srun_is_alone() -> None:
    assert find({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).world_size == 1


def test_mpirun() -> None:
    environment = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        "MASTER_ADDR": "head",
    }
    process = find(environment)
    assert (process.rank, process.world_size, process.address) == (3, 4, "head")


def test_a_process_group_puts_the_environment_back() -> None:
    before = dict(os.environ)
    with process_group(find({})):
        assert os.environ["RANK"] == "0"
    assert dict(os.environ) == before
