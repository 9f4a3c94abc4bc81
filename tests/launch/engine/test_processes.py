"""Rank discovery under every launcher, from the variables each is documented to set."""

import os
from pathlib import Path

import pytest

from launch.engine import processes
from launch.engine.groups import process_group
from launch.engine.processes import find, idle_tasks


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
    [("gpu[003-006,009]", "gpu003"), ("alpha,beta", "alpha"), ("one", "one"), ("a[7,9]b", "a7b")],
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


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 60"])
def test_srun_where_scontrol_does_not_answer(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with Slurm's client and no controller."""
    client = tmp_path / "scontrol"
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(processes, "SCONTROL_SECONDS", 0.2)
    assert processes.expand_first("rack[1-2]node[03-04],z") == "rack1node03"


def test_four_variables_are_enough() -> None:
    """Kubeflow's operators and wrappers written by hand; the local rank is found later."""
    environment = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "29400"}
    process = find(environment)
    assert (process.rank, process.world_size, process.local_rank) == (3, 4, None)
    assert (process.address, process.port, process.launcher) == ("head", 29400, "environment")


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_NODELIST": "a"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
PLACE = {"MASTER_ADDR": "head", "MASTER_PORT": "29400"}
FOUR = {"RANK": "1", "WORLD_SIZE": "4", **PLACE}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "1", **PLACE}, ["RANK=1", "WORLD_SIZE is not set"]),
        ({"WORLD_SIZE": "4", **PLACE}, ["RANK is not set", "WORLD_SIZE=4"]),
        ({"RANK": "4", "WORLD_SIZE": "4", **PLACE}, ["RANK=4 and WORLD_SIZE=4", "0..3"]),
        ({"RANK": "one", "WORLD_SIZE": "4", **PLACE}, ["RANK=one", "whole number"]),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "1"}, ["MASTER_ADDR is not set"]),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, ["MASTER_PORT is not set"]),
        # A RANK that was exported before srun, or left by another launcher
        ({"RANK": "0", "WORLD_SIZE": "4", **PLACE, **STEP}, ["RANK=0", "SLURM_PROCID=1"]),
        ({"RANK": "0", **PLACE, **STEP}, ["RANK=0", "WORLD_SIZE is not set"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **PLACE, **MPI}, ["RANK=0", "OMPI_COMM_WORLD_RANK=1"]),
        ({**MPI, **STEP, "SLURM_PROCID": "2", **PLACE}, ["RANK=1", "SLURM_PROCID=2"]),
        ({**STEP, "SLURM_NTASKS": "1"}, ["SLURM_PROCID=1 and SLURM_NTASKS=1"]),
        ({"RANK": "-1", "WORLD_SIZE": "4", **PLACE}, ["RANK=-1", "whole number"]),
        ({"RANK": " ", "WORLD_SIZE": "4", **PLACE}, ["RANK is not set", "WORLD_SIZE=4"]),
        ({"RANK": "1", "WORLD_SIZE": "4", **PLACE, "MASTER_PORT": "70000"}, ["70000", "65535"]),
        ({"RANK": "1", "WORLD_SIZE": "4", **PLACE, "MASTER_PORT": "0"}, ["MASTER_PORT=0"]),
        ({**MPI, **PLACE, "OMPI_COMM_WORLD_LOCAL_RANK": "4"}, ["OMPI_COMM_WORLD_LOCAL_RANK=4"]),
        ({**FOUR, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SI"]),
        ({**FOUR, "LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE=8", "at most 4"]),
        # Two launchers of MPI's kind, one of them a daemon's or stale
        ({**MPI, **PLACE, "PMI_RANK": "0", "PMI_SIZE": "2"}, ["_RANK=1", "PMI_RANK=0"]),
        ({**FOUR, "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, ["RANK=1", "HOROVOD_SIZE=2"]),
        # One host's daemon doesn't know where the first rank is; OpenMPI 5 doesn't tell.
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ["MASTER_ADDR is not set", "_RANK=1"]),
        # Others there are, and not how many
        ({"PMIX_RANK": "1"}, ["PMIX_RANK=1", "how many", "torchrun"]),
        ({"PALS_RANKID": "0"}, ["PALS_RANKID=0"]),
        ({"PET_NNODES": "4", "PET_NODE_RANK": "1"}, ["PET_NNODES=4", "torchrun"]),
    ],
)
def test_contradictions_are_refused_with_both_values(environment: dict, told: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        find(environment)
    assert all(words in str(refusal.value) for words in told), str(refusal.value)


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("mpiexec", "PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS"),
        ("mvapich", " ".join(f"MV2_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK"))),
        ("jsrun", " ".join(f"JSM_NAMESPACE_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK"))),
        ("horovodrun", "HOROVOD_RANK HOROVOD_SIZE HOROVOD_LOCAL_RANK HOROVOD_LOCAL_SIZE"),
    ],
)
def test_other_mpi_launchers(launcher: str, names: str) -> None:
    """By the names in their manuals: MPICH's and Intel's, MVAPICH2's, LSF's, Horovod's."""
    told = dict(zip(names.split(), ("3", "4", "1", "2"), strict=False))
    process = find({**told, **PLACE})
    assert (process.launcher, process.rank, process.world_size) == (launcher, 3, 4)
    assert process.local_rank == 1
    # Its daemons by srun, one a node; one of Slurm's own, that sets both, agrees.
    daemon = {**STEP, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[4-5]"}
    assert (find({**told, **daemon}).rank, find({**told, **daemon}).address) == (3, "n4")
    same = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[4-5]"}
    assert find({**told, **STEP, **same}).rank == 3
    one_host = dict(zip(names.split(), ("3", "4", "3", "4"), strict=False))
    if len(one_host) == 4:
        assert find(one_host).address == "localhost"


def test_blank_variables_are_none_that_is_set() -> None:
    """As a container's settings leave them out; spaces around a number are no part of it."""
    blank = {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": "", "OMPI_COMM_WORLD_RANK": ""}
    assert find({**blank, "PET_NNODES": "1"}).launcher == "alone"
    assert find({**STEP, **blank, **PLACE}).launcher == "srun"
    assert find({**FOUR, "RANK": " 1\n", "LOCAL_RANK": ""}).rank == 1


def test_an_ipv6_address() -> None:
    assert find({**FOUR, "MASTER_ADDR": "[fd00::2]"}).address == "fd00::2"
    assert find({**FOUR, "MASTER_ADDR": "fd00::2"}).address == "fd00::2"


def test_launchers_inside_launchers() -> None:
    """One torchrun a node by srun; mpirun's daemons by srun; a wrapper that agrees with srun."""
    torchrun = {"RANK": "9", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    marked = find({**STEP, **PLACE, **torchrun, "TORCHELASTIC_RUN_ID": "none"})
    assert (marked.rank, marked.launcher) == (9, "torchrun")
    daemon = {**STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert find({**daemon, **MPI, **PLACE}).launcher == "mpirun"
    agrees = find({**STEP, **PLACE, "RANK": "1", "WORLD_SIZE": "4"})
    assert (agrees.rank, agrees.local_rank) == (1, None)
    # An allocation's shell and a batch script have a step number, too, of another kind.
    assert find({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)}).launcher == "alone"


def test_tasks_of_unequal_nodes() -> None:
    environment = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NTASKS": "5"}
    environment |= {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NODEID": "2", "SLURM_PROCID": "4"}
    assert find(environment).local_size == 1


def test_mpirun_over_several_hosts_finds_the_first() -> None:
    uri = "649199616.0;tcp://192.0.2.2:43273;tcp6://[fd00::2]:35357"
    process = find({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": uri})
    assert process.address == "192.0.2.2"


def test_inside_an_allocation_without_srun_is_alone() -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    assert find(job).world_size == 1
    assert "SLURM_NTASKS=8" in str(idle_tasks(find(job), job))
    assert "NODES=2" in str(idle_tasks(find({}), {"SLURM_JOB_NUM_NODES": "2"}))
    assert idle_tasks(find({}), {"SLURM_NTASKS": "1"}) is None
    assert idle_tasks(find(job | FOUR), job) is None


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
