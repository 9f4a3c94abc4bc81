"""Kill a run while it saves, again and again: is a checkpoint ever lost?

    python bench/save_kills.py --kills 200

A real run of one process saves after every step, in the foreground and in the background by turns,
and resumes by itself. Each life is ended by SIGKILL at a random moment of a save. Afterwards the
newest checkpoint must be whole, and not older than the one that was there before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import deepspeed  # noqa: F401 - here, and not in each life

import launch.training.loop  # noqa: F401
from launch import cli, pretrain
from launch.checkpoint import folders
from launch.engine.signals import STOP
from tests.launch import fleet

PATIENCE = 300.0  # seconds for a life to come to its save


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, kill, and say what was found; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="of saves (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = kill_saves(Path(folder), options.kills, options.seed)
    print(json.dumps(found, indent=1))
    return 1 if found["lost"] or found["damaged"] else 0


def kill_saves(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Counts: lives that were killed, those of them in a save, checkpoints lost and damaged."""
    config = fleet.write_config(
        folder,
        model={"hidden_size": 128},  # a save of some tens of milliseconds
        train={"steps": 10**6, "global_batch_size": 1},
        checkpoint={"interval": 1, "keep_last": 2},
    )
    checkpoints, dice = folder / "run" / "checkpoints", random.Random(seed)
    found: dict[str, Any] = {"lives": 0, "killed_in_a_save": 0, "lost": 0, "damaged": 0}
    while found["killed_in_a_save"] < kills:
        background = found["lives"] % 2 == 1
        before = newest(checkpoints)
        pid = start(folder, config, background)
        wait_for(lambda before=before: newest(checkpoints) >= before + 2, pid)
        begin, step = time.monotonic(), newest(checkpoints)
        wait_for(lambda step=step: newest(checkpoints) > step, pid)
        time.sleep((time.monotonic() - begin) * dice.random())  # a moment of the next one
        kept = newest(checkpoints)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found["lives"] += 1
        found["killed_in_a_save"] += any(checkpoints.glob("step_*.tmp"))
        found["lost"] += newest(checkpoints) < kept
        found["damaged"] += bool(folders.damage(folders.current(checkpoints)[0]))
        if found["lives"] % 20 == 0:
            print(found, flush=True)
    return found


def newest(checkpoints: Path) -> int:
    """The step that `latest` names; 0 where there is none yet."""
    name = folders.latest(checkpoints)
    return folders.step_of(Path(name)) if name else 0


def start(folder: Path, config: Path, background: bool) -> int:
    """A run in a process of its own, which has imported everything already."""
    pid = os.fork()
    if pid:
        return pid
    try:
        with open(folder / "log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        STOP.listen()
        how = fleet.words({"checkpoint.background": json.dumps(background)})
        run = ["--run-dir", str(folder / "run"), "--resume", "auto"]
        sys.argv = ["launch/pretrain.py", "--config", str(config), *run, *how]
        cli.run_verb(pretrain.main)
    finally:
        os._exit(1)


def wait_for(condition: Any, pid: int) -> None:
    """Until `condition()`, while the process lives."""
    until = time.monotonic() + PATIENCE
    while not condition():
        ended, status = os.waitpid(pid, os.WNOHANG)
        assert not ended, f"the run ended by itself, status {status}"
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.001)  # polling a file that another process writes


if __name__ == "__main__":
    sys.exit(main())
