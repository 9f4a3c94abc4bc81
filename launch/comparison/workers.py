"""An experiment's runs, some at a time, each worker a process that trains one after another.

Starting Python, torch and DeepSpeed costs ten seconds of a core, and a GPU's context some more: a
worker pays once and keeps them from run to run. After a failure a fresh one takes its place.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from launch.engine.signals import STOP

if TYPE_CHECKING:  # a worker needs none of what a plan does
    from launch.comparison.plan import PlannedRun

SECONDS_BETWEEN_LINES = 15.0
Train = Callable[[list[str]], None]


@dataclass
class Worker:
    """A process that trains what it is sent, and the run that it is at."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    run: PlannedRun | None = None


@dataclass
class Outcome:
    """What became of the runs: finished now, and failed with the reason."""

    finished: list[PlannedRun] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def train_all(
    runs: Sequence[PlannedRun], workers: int, train: Train, say: Callable[[str], None]
) -> Outcome:
    """Train `runs`, at most `workers` at once; a failed one is told and stops no other.

    SIGTERM and Ctrl-C let each run write a checkpoint and leave.

    Args:
        train: trains one run, given pretrain.py's arguments.
    """
    waiting, outcome = deque(runs), Outcome()
    context = multiprocessing.get_context("spawn")  # a fork could not use a GPU
    places: list[Worker | None] = [None] * min(workers, len(runs))
    standing = Standing(runs, say)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(*_: object) -> None:
        outcome.stopped = True
        for worker in places:
            if worker is not None and worker.process.is_alive():
                worker.process.terminate()

    for number in before:
        signal.signal(number, stop)
    try:
        while (waiting and not outcome.stopped) or any(w and w.run for w in places):
            for place, worker in enumerate(places):
                if (worker is None or worker.run is None) and waiting and not outcome.stopped:
                    worker = places[place] = worker or start(context, gpu_of(place), train)
                    worker.run = waiting.popleft()
                    worker.connection.send((worker.run.folder, worker.run.arguments()))
            busy = {w.connection: w for w in places if w is not None and w.run is not None}
            for connection in wait([*busy], timeout=1.0):
                settle(busy[connection], outcome, say)  # type: ignore[index]
            places[:] = [w if w and (w.run or w.process.is_alive()) else None for w in places]
            standing.tell([w.run for w in busy.values() if w.run is not None])
    finally:
        for worker in places:
            if worker is not None:
                with suppress(BrokenPipeError):
                    worker.connection.send(None)  # the end of its work
                worker.process.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    return outcome


def gpu_of(place: int) -> str | None:
    """The GPU of the worker in a place, as CUDA_VISIBLE_DEVICES names it; None without GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(number) for number in range(gpus)]
    return names[place % gpus] if gpus else None


def start(context: multiprocessing.context.SpawnContext, gpu: str | None, train: Train) -> Worker:
    """A new worker."""
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, gpu, train))
    process.start()
    theirs.close()
    return Worker(process, ours)


def settle(worker: Worker, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Take down what became of a worker's run."""
    run = worker.run
    assert run is not None
    worker.run = None
    try:
        problem = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        problem = f"its process ended with {worker.process.exitcode}"
    if problem is not None:
        worker.process.join()  # it leaves after a failure: the next one starts afresh
    if run.finished:
        outcome.finished.append(run)
        say(f"{run.name}: finished")
    elif not outcome.stopped:
        told = problem or "it left before its last step"
        outcome.failed[run.name] = told
        say(f"{run.name}: FAILED, {told} (see {run.folder / 'log.txt'})")


def work(connection: Connection, gpu: str | None, train: Train) -> None:
    """A worker's life: train the runs that arrive, (folder, arguments) each, until None does."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    STOP.listen()
    STOP.launched = True  # a signal to all of a group comes from the parent once more
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sends SIGTERM on
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that --workers changes no sum's order
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    while True:
        if (job := connection.recv()) is None:
            return
        folder, arguments = job
        problem = train_one(folder, arguments, train)
        connection.send(problem)
        if problem is not None:
            return
        gc.collect()


def leave_with_parent() -> None:
    """Write a checkpoint and go when the parent was killed: a second start may follow."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def train_one(folder: Path, arguments: list[str], train: Train) -> str | None:
    """Train a run with its output in its own log; the reason where it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.argv = ["launch/pretrain.py", *arguments]  # for the run's manifest
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        sys.stdout.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            train(arguments)
        except ValueError as error:
            print(f"error: {error}", flush=True)
            return str(error)
        except (Exception, SystemExit) as error:
            import traceback

            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        finally:
            sys.stdout.flush()
    return None


class Standing:
    """A line now and then: runs, steps, time left."""

    def __init__(self, runs: Sequence[PlannedRun], say: Callable[[str], None]) -> None:
        self.runs, self.say = runs, say
        self.total = sum(run.config.train.steps for run in runs)
        self.began = self.last = time.monotonic()
        self.done_before = self.steps_done()

    def steps_done(self) -> int:
        return sum(run.config.train.steps if run.finished else steps_of(run) for run in self.runs)

    def tell(self, running: list[PlannedRun]) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        done = self.steps_done()
        finished = sum(run.finished for run in self.runs)
        rate = (done - self.done_before) / (now - self.began)
        left = f"{(self.total - done) / rate / 60:.1f} min left" if rate else "starting"
        self.say(
            f"{finished} of {len(self.runs)} runs finished, {len(running)} running, "
            f"step {done:,} of {self.total:,}, {rate:.1f} steps/s, {left}"
        )


def steps_of(run: PlannedRun) -> int:
    """Steps that an unfinished run's metrics hold."""
    path = run.folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
