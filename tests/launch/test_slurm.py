"""A real Slurm, all of it on this machine: a job that is warned, queued again, and finishes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch.planning import jobs
from tests.launch import fleet
from tests.launch.running import ENVIRONMENT, ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurmctld slurmd munge"
    ),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd needs root"),
]

CONFIGURATION = """
ClusterName=l2e
SlurmctldHost={host}({address})
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
NodeName={host} NodeAddr={address} CPUs=64 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach a controller of our own."""
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    text = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0], address="127.0.0.1", folder=folder,
        controller=free_port(), daemon=free_port(),
    )  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    for number in range(2):  # what stands for a GPU's device file
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {**ENVIRONMENT, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
    munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
    with ExitStack() as stack:
        for name, *command in (
            ("munged", *munged),
            ("slurmctld", "slurmctld", "-D", "-c"),
            ("slurmd", "slurmd", "-D", "-c"),
        ):
            log = folder / f"{name}.out"
            command[0] = shutil.which(command[0], path=PATH) or command[0]
            stack.enter_context(fleet.started(log, *command, **environment))
        wait_until(lambda: "idle" in call(environment, "sinfo", "-h", "-o", "%t"), 60, folder)
        yield environment


def call(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def wait_until(condition, seconds: float, logs: Path) -> None:
    until = time.monotonic() + seconds
    while not condition():
        told = "\n".join(path.read_text(errors="replace") for path in logs.glob("*.[lo][ou][gt]"))
        assert time.monotonic() < until, told
        time.sleep(0.5)  # polling programs of Slurm's


def test_a_warned_job_goes_on_by_itself(slurm: dict[str, str], tmp_path: Path) -> None:
    config = fleet.write_config(tmp_path, train={"steps": 100, "global_batch_size": 2})
    run, script = tmp_path / "run", tmp_path / "job.slurm"
    arguments = ["--config", str(config), "--run-dir", str(run), "--scheduler", "slurm"]
    jobs.main([*arguments, "--gpus-per-node", "2", "--output", str(script)])
    environment = slurm | {"PYTHON": sys.executable}
    log = tmp_path / "job.log"
    said = call(environment, "sbatch", f"--output={log}", str(script))
    job = said.split()[-1]
    try:
        wait_until(lambda: fleet.steps(run) >= 5, 120, tmp_path)
        call(environment, "scancel", "--signal=USR1", job)
        wait_until((run / "finished").exists, 240, tmp_path)
        state = ""
        wait_until(
            lambda: "COMPLETED" in call(environment, "scontrol", "show", "job", job), 60, tmp_path
        )
        state = call(environment, "scontrol", "show", "job", job)
    finally:
        call(environment, "scancel", job)
    assert "Restarts=1" in state
    assert "stopped by a signal after step" in log.read_text()
    assert "resumed from" in log.read_text()
    assert sorted(fleet.losses(run)) == list(range(1, 101))
