"""Disturb a run of several processes again and again, and hold its numbers against a quiet one's.

    python bench/soak.py --steps 2000 --faults 100 --processes 4

Ranks are killed, stopped, told to leave by each signal, find their disk full, or the link between
their hosts dead (where network namespaces can be made), at random moments of random steps. Each
time the run must end (or go on) by itself inside a minute, nothing may be left running, the newest
checkpoint must not be older than one that was there before, and in the end every step's loss and
Monosemantic Scale statistics must be the quiet run's to the bit.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.launch import fleet
from tests.launch.hosts import Hosts, two_hosts, why_none

# One that was ignored here from the start, as nohup asks, the ranks ignore too.
SIGNALS = [
    number
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    if signal.getsignal(number) is not signal.SIG_IGN
]
KINDS = ("kill", "stop", "signal", "full disk", "dead link")
STEP_TIMEOUT = 10  # seconds; a stopped rank is given up after it
SMALL = 4096  # bytes a file may have on the full disk
FULL = 0.3  # seconds that a disk is full at most, before a signal and after it


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, run both, and say what was found; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="of the run (default: 2000)")
    parser.add_argument("--faults", type=int, default=100, help="at least (default: 100)")
    parser.add_argument("--processes", type=int, default=4, help="ranks (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--folder", type=Path, help="of both runs (default: a temporary one)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        reason = why_none()
        if reason is not None:
            print(f"no dead links: {reason}")
        with nullcontext() if reason else two_hosts() as hosts:
            how = (options.steps, options.faults, options.processes, options.seed)
            found = soak(folder, *how, hosts)
    print(json.dumps(found, indent=1))
    return 0 if not found["differing_steps"] and not found["lost_checkpoints"] else 1


def soak(
    folder: Path, steps: int, faults: int, processes: int, seed: int, hosts: Hosts | None = None
) -> dict[str, Any]:
    """What became of `faults` faults in a run of `steps` steps, as numbers.

    hosts: where the disturbed run's ranks are, by turns; without them no link dies.
    """
    config = fleet.write_config(folder, train={"steps": steps, "global_batch_size": processes})
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    with fleet.ranks(processes, config, quiet, logs=folder / "quiet_logs") as members:
        fleet.wait_for_end(members, 3600)
        assert all(member.process.returncode == 0 for member in members), members[0].output()
    counts: Counter[str] = Counter()
    dice, lost, slowest, life = random.Random(seed), 0, 0.0, 0
    while not (disturbed / "finished").exists():
        life += 1
        before = fleet.newest(disturbed)
        timeout = fleet.words({"parallel.step_timeout": STEP_TIMEOUT})
        logs = folder / f"life_{life:04d}"
        with fleet.ranks(
            processes, config, disturbed, "--resume", "auto", *timeout, logs=logs, hosts=hosts
        ) as members:
            left = max(1, faults - sum(counts.values()))
            apart = max(2, (steps - fleet.steps(disturbed)) // (left + 1))
            enough = sum(counts.values()) >= faults
            kind, victim = disturb(members, disturbed, dice, apart, enough, hosts)
            counts[kind] += kind != "none"
            if kind == "stop" and hosts is not None:
                # Nobody of its host may be left to end it; continued, it leaves by itself.
                fleet.wait_for_end([one for one in members if one.process is not victim], 60)
                victim.send_signal(signal.SIGCONT)
            seconds = fleet.wait_for_end(members, 3600 if kind == "none" else 60)
            slowest = max(slowest, seconds if kind != "none" else 0.0)
            if hosts is not None:
                hosts.link(up=True)
        lost += fleet.newest(disturbed) < before
        print(f"life {life}: {kind}, at step {fleet.steps(disturbed)}", flush=True)
    return {
        "faults": dict(counts),
        "lives": life,
        "slowest_end_seconds": round(slowest, 1),
        "lost_checkpoints": lost,
        "differing_steps": differing(quiet, disturbed),
    }


def disturb(
    members: list[fleet.Member],
    run: Path,
    dice: random.Random,
    apart: int,
    enough: bool,
    hosts: Hosts | None,
) -> tuple[str, subprocess.Popen]:
    """Do something to a rank up to `apart` steps from now; the kind of fault, and to which."""
    goal = fleet.steps(run) + dice.randint(1, apart)
    while fleet.steps(run) < goal or enough:
        if any(member.process.poll() is not None for member in members):
            return "none", members[0].process  # at its end
        time.sleep(0.02)  # polling a file that another process writes
    kind = dice.choice(KINDS if hosts else KINDS[:-1])
    victim = dice.choice(members).process
    time.sleep(dice.random() * 0.1)
    if kind == "full disk":
        limits = [resource.prlimit(m.process.pid, resource.RLIMIT_FSIZE) for m in members]
        for member, (_, hard) in zip(members, limits, strict=True):
            resource.prlimit(member.process.pid, resource.RLIMIT_FSIZE, (SMALL, hard))
        time.sleep(dice.random() * FULL)
        victim.send_signal(signal.SIGTERM)
        time.sleep(FULL)
        for member, limit in zip(members, limits, strict=True):
            if member.process.poll() is None:
                resource.prlimit(member.process.pid, resource.RLIMIT_FSIZE, limit)
    elif kind == "dead link":
        assert hosts is not None
        hosts.link(up=False)
    else:
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "signal": dice.choice(SIGNALS)}
        victim.send_signal(number[kind])
    return kind, victim


def differing(one: Path, other: Path) -> list[int]:
    """Steps whose loss or Monosemantic Scale statistics are not the same to the bit."""

    def told(run: Path) -> dict[int, Any]:
        rows = fleet.metrics(run)
        return {row["step"]: [row["lm_loss"], row["ms_loss"], row["l2e"]] for row in rows}

    first, second = told(one), told(other)
    return sorted(step for step in first | second if first.get(step) != second.get(step))


if __name__ == "__main__":
    sys.exit(main())
