"""How tests run the verbs: as a user does, in processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Two cores are shared by all processes; a rank must not wait for threads of its neighbours.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def python(*command: str | Path, timeout: int = 300, cwd: Path = ROOT, **environment: str):
    """The finished `python COMMAND` of the repository's root; its output is captured as text."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def torchrun(processes: int, *command: str | Path, **options):
    """`torchrun` with a free port of its own."""
    words = ("--standalone", "--nproc-per-node", str(processes))
    return python("-m", "torch.distributed.run", *words, *command, **options)


def deepspeed(processes: int, *command: str | Path, **options):
    """The deepspeed launcher on a free port."""
    launcher = Path(sys.executable).with_name("deepspeed")
    words = ("--num_gpus", str(processes), "--master_port", str(free_port()))
    return python(launcher, *words, *command, **options)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
