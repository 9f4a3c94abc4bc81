"""Which process of which run is this? Found under deepspeed, torchrun, srun, mpirun, or alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

# What each launcher calls the rank, the number of ranks, and the same two within a node.
VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}


@dataclass(frozen=True)
class Process:
    """This process among all ranks of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launcher: str
    address: str
    port: int

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0


def find(environment: Mapping[str, str] = os.environ) -> Process:
    """This process, read from what the launcher left in the environment."""
    if "SLURM_STEP_ID" in environment and "RANK" not in environment:
        return from_variables(environment, "srun")
    for launcher in ("torchrun", "deepspeed", "mpirun"):
        names = VARIABLES[launcher]
        if names[0] in environment and names[3] in environment:
            return from_variables(environment, launcher)
    return Process(0, 1, 0, 1, "alone", "localhost", 0)


def from_variables(environment: Mapping[str, str], launcher: str) -> Process:
    """A process whose launcher uses these variable names."""
    rank, size, local_rank, local_size = VARIABLES[launcher]
    return Process(
        rank=int(environment[rank]),
        world_size=int(environment[size]),
        local_rank=int(environment.get(local_rank, "0")),
        # Slurm writes "8(x2)" for 8 tasks on each of 2 nodes
        local_size=int(re.match(r"\d+", environment.get(local_size, "1")).group()),
        launcher=launcher,
        address=environment.get("MASTER_ADDR") or first_host(environment),
        port=int(environment.get("MASTER_PORT") or port_of_job(environment)),
    )


def first_host(environment: Mapping[str, str]) -> str:
    """The host of rank 0, where only Slurm's node list names it."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        return "localhost"
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    # node[003-006,9],other -> node003
    match = re.match(r"([^,\[]+)(?:\[(\d+))?([^,\]-]*)", nodes)
    assert match is not None
    return match.group(1) + (match.group(2) or "")


def port_of_job(environment: Mapping[str, str]) -> int:
    """A port that all ranks of a job agree on and that two jobs of one node seldom share."""
    return 20000 + int(environment.get("SLURM_JOB_ID", "9500")) % 20000


@contextmanager
def exported(process: Process) -> Iterator[None]:
    """The variables that torch and DeepSpeed read, whatever the launcher called them.

    Put back afterwards: a later library would take them for a launcher's.
    """
    before = dict(os.environ)
    os.environ.update(
        RANK=str(process.rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_RANK=str(process.local_rank),
        MASTER_ADDR=process.address,
        MASTER_PORT=str(process.port),
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def process_group(process: Process, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """torch.distributed for the length of the block, ended on every way out.

    gloo aborts a process that leaves without destroying its groups, hence the finally. After an
    error the other ranks may be anywhere, so only a clean end waits for them.
    """
    import torch
    import torch.distributed as dist

    from launch.engine import hardware

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(process.local_rank)
    else:
        hardware.keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // process.local_size))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    with exported(process):
        if process.launcher == "alone":
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
        try:
            yield
            dist.barrier()
        finally:
            dist.destroy_process_group()


@contextmanager
def single_process() -> Iterator[None]:
    """The processes a launcher started (or this one alone), each holding whole models."""
    from configs.schema import Parallel
    from launch.engine.layout import initialise_layout, release_layout

    with process_group(find()):
        initialise_layout(Parallel())
        try:
            yield
        finally:
            release_layout()
