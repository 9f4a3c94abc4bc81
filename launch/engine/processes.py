"""Which process of which run is this? Found under deepspeed, torchrun, srun, MPI's, or alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlparse


@dataclass(frozen=True)
class Variables:
    """What a launcher calls a process's rank, the number of ranks, and both within a node."""

    rank: str
    world_size: str
    local_rank: str
    local_size: str
    mark: str  # set by this launcher alone

    def described(self, environment: Mapping[str, str]) -> str:
        """RANK=3 and WORLD_SIZE=8, as the environment has them."""
        return " and ".join(
            f"{name}={environment.get(name, '(not set)')}" for name in (self.rank, self.world_size)
        )


VARIABLES = {
    "torchrun": Variables(
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"
    ),
    "deepspeed": Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK"),
    # Kubeflow's operators and wrappers written by hand; often without the local two.
    "environment": Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK"),
    "mpirun": Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_RANK",
    ),
    "jsrun": Variables(  # IBM's, under LSF
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
        "JSM_NAMESPACE_RANK",
    ),
    "horovodrun": Variables(
        "HOROVOD_RANK",
        "HOROVOD_SIZE",
        "HOROVOD_LOCAL_RANK",
        "HOROVOD_LOCAL_SIZE",
        "HOROVOD_RANK",
    ),
    "mvapich": Variables(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "MV2_COMM_WORLD_RANK",
    ),
    # MPICH's, Intel's and Cray's; Flux sets the first two.
    "mpiexec": Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_RANK"),
    "srun": Variables(
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_STEP_ID",
    ),
}
# Launchers with names of their own; where several are set they have to agree.
MPI = ("mpirun", "jsrun", "horovodrun", "mvapich", "mpiexec")
# What tells that there are other processes, and not how many.
WITHOUT_SIZE = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE")
# Slurm numbers the steps that srun makes from 0; above this are a job's script and its shell.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
SCONTROL_SECONDS = 20.0


@dataclass(frozen=True)
class Process:
    """This process among all ranks of the run."""

    rank: int
    world_size: int
    local_rank: int | None  # None: not told by the launcher; found when the ranks meet
    local_size: int | None
    launcher: str
    address: str
    port: int

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0


ALONE = Process(0, 1, 0, 1, "alone", "localhost", 0)


def find(environment: Mapping[str, str] = os.environ) -> Process:
    """This process, read from what the launcher left in the environment.

    Raises:
        ValueError: the variables are incomplete or contradict each other.
    """
    # A blank variable is how job files and containers leave one out.
    environment = {name: text.strip() for name, text in environment.items() if text.strip()}
    launcher = find_launcher(environment)
    if launcher is None:
        refuse_without_size(environment)
        return ALONE
    process = from_variables(environment, launcher)
    refuse_contradictions(environment, process)
    return process


def find_launcher(environment: Mapping[str, str]) -> str | None:
    """The innermost launcher that has set the environment's variables."""
    if "RANK" in environment:
        for launcher in ("torchrun", "deepspeed"):
            names = VARIABLES[launcher]
            if names.mark in environment or names.local_size in environment:
                return launcher
        return "environment"
    for launcher in MPI:
        if VARIABLES[launcher].mark in environment:
            return launcher
    if in_srun(environment):
        return "srun"
    return "environment" if environment.get("WORLD_SIZE", "1") != "1" else None


def in_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, and not sbatch or salloc."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_SPECIAL_STEP


def from_variables(environment: Mapping[str, str], launcher: str) -> Process:
    """A process whose launcher uses these variable names."""
    names = VARIABLES[launcher]
    rank, size = number(environment, names.rank), number(environment, names.world_size)
    if rank is None or size is None:
        missing = names.rank if rank is None else names.world_size
        raise ValueError(
            f"{missing} is not set, but {names.described(environment)}: set both, or neither for "
            "a run of one process"
        )
    if not 0 <= rank < size:
        raise ValueError(
            f"{names.described(environment)}: the rank must lie in 0..{size - 1}; unset what is "
            "left of an earlier job, or correct the launcher's line"
        )
    local_rank = 0 if size == 1 else number(environment, names.local_rank)
    local_size = 1 if size == 1 else tasks_of_node(environment, names.local_size)
    if not (local_rank or 0) < (local_size or size) <= size:
        raise ValueError(
            f"{names.described(environment)}, with {names.local_rank}={local_rank} and "
            f"{names.local_size}={local_size} within the host: the one must lie below the other, "
            f"and that be at most {size}; correct them, or unset both"
        )
    return Process(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_size=local_size,
        launcher=launcher,
        address=environment.get("MASTER_ADDR", "").strip("[]") or first_host(environment, launcher),
        port=port(environment, launcher),
    )


def idle_tasks(process: Process, environment: Mapping[str, str] = os.environ) -> str | None:
    """What a run that is alone leaves unused of its Slurm job, in words; it may be meant so."""
    if process.launcher != "alone":
        return None
    for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
        if (count := environment.get(name, "1")) != "1":
            return f"{name}={count}, but this run is of one process: srun starts it in all tasks"
    return None


def refuse_without_size(environment: Mapping[str, str]) -> None:
    """Raise ValueError for a process that seems alone and has been told that it is not."""
    told = [name for name in WITHOUT_SIZE if name in environment]
    told += [name for name in ("PET_NNODES",) if environment.get(name, "1") != "1"]
    if told:
        raise ValueError(
            f"{told[0]}={environment[told[0]]}, but nothing says how many processes there are and "
            "which one this is: set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start the "
            f"run through torchrun; for a run of one process, unset it (env -u {told[0]} ...)"
        )


def number(environment: Mapping[str, str], name: str) -> int | None:
    """A variable that holds a whole number; None where it is not set."""
    text = environment.get(name)
    if not text:
        return None
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name}={text} in the environment is no whole number")
    return int(text)


def tasks_of_node(environment: Mapping[str, str], name: str) -> int | None:
    """The number of ranks on this node.

    Slurm lists the nodes' tasks, "4(x2),3": that of the node with number SLURM_NODEID.
    """
    text = environment.get(name)
    if not text:
        return None
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{name}={text} in the environment is no number of tasks")
        counts += [int(match[1])] * int(match[2] or 1)
    node = number(environment, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else counts[0]


def refuse_contradictions(environment: Mapping[str, str], process: Process) -> None:
    """Two launchers that number this process differently: only one of them can be right.

    torchrun and deepspeed sign what they set; srun or mpirun around them start them, not ranks.
    mpirun and its like start their own daemons in a Slurm job by srun, fewer than there are ranks.
    """
    own = VARIABLES[process.launcher]
    if process.launcher in ("torchrun", "deepspeed") and own.mark in environment:
        return
    for launcher in (*MPI, "srun"):
        other = VARIABLES[launcher]
        if launcher == process.launcher or other.rank not in environment:
            continue
        if launcher == "srun" and not in_srun(environment):
            continue
        rank, size = number(environment, other.rank), number(environment, other.world_size)
        by_mpi = launcher == "srun" and process.launcher in MPI
        daemons = by_mpi and (size or 0) < process.world_size
        if not daemons and (rank, size) != (process.rank, process.world_size):
            raise ValueError(
                f"two launchers number this process: {own.described(environment)}, but "
                f"{other.described(environment)}. Start the run through one of them, or unset the "
                f"other's variables (env -u {own.rank} -u {own.world_size} ..., or -u {other.mark})"
            )


def first_host(environment: Mapping[str, str], launcher: str) -> str:
    """The host of rank 0, where MASTER_ADDR doesn't name it."""
    names = VARIABLES[launcher]
    if launcher in MPI and environment.get(names.local_size) == environment[names.world_size]:
        return "localhost"
    # The address of OpenMPI's mpirun itself, on whose host the first rank runs.
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "").split(";")
    if launcher == "mpirun" and len(uri) > 1 and (host := urlparse(uri[1]).hostname):
        return host
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes:
        return expand_first(nodes)
    if environment[names.world_size] != "1":
        raise ValueError(
            f"MASTER_ADDR is not set, but {names.described(environment)}: set it to the host of "
            "rank 0"
        )
    return "localhost"


def expand_first(nodes: str) -> str:
    """The first of a Slurm node list: node[003-006,9],other -> node003.

    By scontrol, which knows every form; by ourselves where it is missing or has no controller.
    """
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        try:
            found = subprocess.run(
                command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            found = None
        if found is not None and found.returncode == 0 and found.stdout.split():
            return found.stdout.split()[0]
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # up to a comma outside brackets
    if first is None:
        raise ValueError(f"the node list {nodes!r} in Slurm's environment names no node")
    # Of each bracket the first number: [003-006,9] -> 003.
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def port(environment: Mapping[str, str], launcher: str) -> int:
    """MASTER_PORT, or one that all ranks of a job agree on and two jobs of a node seldom share."""
    given = number(environment, "MASTER_PORT")
    if given is not None:
        if not 0 < given < 2**16:
            raise ValueError(f"MASTER_PORT={given} is no port: they go from 1 to {2**16 - 1}")
        return given
    if launcher not in (*MPI, "srun") and environment.get("WORLD_SIZE") != "1":
        raise ValueError(
            f"MASTER_PORT is not set, but {VARIABLES[launcher].described(environment)}: set it to "
            "a free port of the host of rank 0, the same for all ranks"
        )
    job = number(environment, "SLURM_JOB_ID") or number(environment, "OMPI_MCA_ess_base_jobid")
    step = number(environment, "SLURM_STEP_ID") or 0
    return 20000 + ((job or 9500) + 97 * step) % 20000
