"""Where a step's time goes, and the profiler's trace of chosen steps."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile


class Stopwatch:
    """Adds up the seconds spent in named parts, without waiting for the device meanwhile.

    On a GPU the parts are marked by events in its queue, so a part's time is the device's; data
    exchanged between ranks counts with the part that starts it.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        begin = self.now()
        yield
        self.spans[name].append((begin, self.now()))

    def now(self):
        """A moment: an event on the device, or seconds of the host's clock."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        spans, self.spans = self.spans, defaultdict(list)
        return {name: sum(map(self.length, pairs)) for name, pairs in spans.items()}

    def length(self, span: tuple) -> float:
        """Seconds between a span's two moments."""
        begin, end = span
        return begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parse_steps(text: str | None) -> range:
    """The steps `5` or `5-7` (both included), counted from 1 as in metrics.jsonl; None: none."""
    if text is None:
        return range(0)
    first, dash, last = text.partition("-")
    if first.isdecimal() and int(first) >= 1 and (not dash or last.isdecimal()):
        steps = range(int(first), int(last if dash else first) + 1)
        if steps:
            return steps
    raise ValueError(f"--profile {text!r}: no steps; give one as 5 or several as 5-7, from 1 on")


class Profiler:
    """Writes torch.profiler's trace of some steps to `folder`, one file a rank."""

    def __init__(self, steps: range, folder: Path, rank: int) -> None:
        """`steps` may be empty: then nothing is recorded."""
        self.steps, self.path = steps, folder / f"trace_rank_{rank}.json"
        self.running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record step `number` if it was chosen; write the trace after the last one."""
        if number in self.steps and self.running is None:
            self.running = profile(profile_memory=True, record_shapes=True)
            self.running.start()
        yield
        if self.running is not None and number == self.steps[-1]:
            self.running.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.running.export_chrome_trace(str(self.path))
            self.running = None
