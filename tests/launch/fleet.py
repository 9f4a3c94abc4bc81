"""Runs of several ranks that tests disturb: real processes, each ended by its id."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.random_tokens import write_random_tokens
from tests.launch.hosts import Hosts
from tests.launch.running import ENVIRONMENT, ROOT, free_port

VERB = str(ROOT / "launch" / "pretrain.py")


def write_config(folder: Path, **sections: dict) -> Path:
    """A run of seconds on random tokens; `sections` change its keys."""
    prefix = write_random_tokens(folder / "tokens", 2**16, vocab_size=256)
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 256}
    settings = {
        "model": shape,
        "l2e": {"late_start_step": 4, "forget_step": 4},
        "data": {"path": str(prefix), "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 5000, "global_batch_size": 4, "micro_batch_size": 1, "dtype": "fp32"},
        "evaluate": {"interval": 0, "batches": 1},
        "logging": {"interval": 1, "tensorboard": False},
        "checkpoint": {"interval": 5, "keep_last": 3},
    }
    for name, keys in sections.items():
        settings[name] = settings.get(name, {}) | keys
    path = folder / "tiny.json"
    path.write_text(json.dumps(settings))
    return path


def words(settings: dict) -> list[str]:
    """--set KEY=VALUE for each."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@dataclass
class Member:
    """One process and the file of its output."""

    process: subprocess.Popen
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        return self.output().strip().splitlines()[-1]


@contextmanager
def started(log: Path, *command: str | Path, **environment: str) -> Iterator[Member]:
    """A process of the repository's root; it and what it started are ended at the latest here."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=ENVIRONMENT | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Member(process, log)
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            end(pid)
        process.wait()


@contextmanager
def ranks(
    count: int,
    config: Path,
    run: Path,
    *more: str,
    logs: Path,
    program: str | Path = VERB,
    hosts: Hosts | None = None,
) -> Iterator[list[Member]]:
    """`count` ranks that no launcher looks after, only each other; by turns on each of `hosts`."""
    logs.mkdir(parents=True, exist_ok=True)
    address = hosts.addresses[0] if hosts else "localhost"
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    command = (sys.executable, program, "--config", config, "--run-dir", run, *more)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    logs / f"rank_{rank}.log",
                    *(hosts.within(rank % 2) if hosts else ()),
                    *command,
                    RANK=str(rank),
                    **place,
                )
            )
            for rank in range(count)
        ]


def end(pid: int) -> None:
    """Kill a process that may be gone or stopped."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """The living processes that this one has started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, children) for one in [child, *descendants(child)]]


def steps(run: Path) -> int:
    """The newest step in a run's metrics."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):  # not there yet, or half a line
        return 0


def wait_for(condition, *members: Member, seconds: float = 120) -> None:
    """Until `condition()`; fails when a process ends before or the time is up."""
    until = time.monotonic() + seconds
    while not condition():
        ended = [member for member in members if member.process.poll() is not None]
        assert not ended, ended[0].output()
        assert time.monotonic() < until, "\n".join(member.output() for member in members)
        time.sleep(0.05)  # polling a file that another process writes


def wait_for_step(run: Path, step: int, *members: Member) -> None:
    """Until the run has written `step`."""
    wait_for(lambda: steps(run) >= step, *members)


def wait_for_end(members: list[Member], seconds: float) -> float:
    """The seconds until the last of them has ended; fails when that takes longer."""
    begin = time.monotonic()
    for member in members:
        left = begin + seconds - time.monotonic()
        try:
            member.process.wait(timeout=max(0.1, left))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {member.output()}") from None
    return time.monotonic() - begin


def newest(run: Path) -> int:
    """The step of the checkpoint that `latest` names; 0 where there is none yet."""
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """The training loss after each step."""
    return {row["step"]: row["lm_loss"] for row in metrics(run)}
