"""How tests run the verbs: as a user does, in processes of their own."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Two cores are shared by all processes; a rank must not wait for threads of its neighbours.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def python(
    *command: object,
    timeout: int = 300,
    cwd: Path = ROOT,
    memory: int = resource.RLIM_INFINITY,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The finished `python COMMAND` of the repository's root; its output is captured as text.

    Args:
        memory: bytes of addresses that the process may have.
    """
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
    )


def succeeds(*command: object, **options) -> subprocess.CompletedProcess[str]:
    """The same where it must end well."""
    done = python(*command, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done


def refused(*command: object, **options) -> str:
    """What it tells its user where it must end because of a mistake of theirs."""
    done = python(*command, **options)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def torchrun(processes: int, *command: object, run=succeeds):
    """`torchrun` with a free port of its own."""
    words = ("--standalone", "--nproc-per-node", processes)
    return run("-m", "torch.distributed.run", *words, *command)


def deepspeed(processes: int, *command: object) -> None:
    """The deepspeed launcher on a free port."""
    launcher = Path(sys.executable).with_name("deepspeed")
    words = ("--num_gpus", processes, "--master_port", free_port())
    succeeds(launcher, *words, *command)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
