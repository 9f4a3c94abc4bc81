"""Where a step's time goes, and the profiler's trace of chosen steps."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import DeviceType, profile, record_function

from l2e.progress import say

# What the profiler calls an exchange between ranks: gloo's on a CPU, NCCL's kernels on a GPU.
EXCHANGES = ("gloo:", "nccl")

Span = tuple[float, float]  # beginning and end


class Stopwatch:
    """Adds up the seconds spent in named parts, without waiting for the device meanwhile.

    On a GPU the parts are marked by events in its queue, so a part's time is the device's.
    Exchanges between ranks run beside them, and only a trace tells those apart: see `Profiler`.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list[tuple]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`."""
        begin = self.now()
        with record_function(name):  # so that a trace has the same parts
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
    """Writes torch.profiler's trace of some steps to `folder`, one file a rank.

    Beside it, in communication_rank_N.json, the seconds a step that exchanges between ranks took,
    and those of them in which nothing was computed; the first rank also prints them.
    """

    def __init__(self, steps: range, folder: Path, rank: int) -> None:
        """`steps` may be empty: then nothing is recorded."""
        self.steps, self.folder, self.rank = steps, folder, rank
        self.running: profile | None = None

    def expect(self, coming: range) -> None:
        """Raise ValueError if a chosen step is not among those that will run."""
        if set(self.steps) - set(coming):
            raise ValueError(
                f"--profile: steps {self.steps[0]} to {self.steps[-1]} were chosen, but steps "
                f"{coming[0]} to {coming[-1]} will run; choose some of these"
            )

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record step `number` if it was chosen; write the trace after the last one."""
        if number in self.steps and self.running is None:
            self.running = profile(profile_memory=True, record_shapes=True)
            self.running.start()
        yield
        if self.running is not None and number == self.steps[-1]:
            self.running.stop()
            try:
                self.write(self.running)
            except (OSError, RuntimeError) as error:  # the latter torch's
                say(f"--profile: {self.folder} cannot be written ({error}); training goes on")
            self.running = None

    def write(self, recorded: profile) -> None:
        """The trace, and what it says of communication."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace_rank_{self.rank}.json"
        recorded.export_chrome_trace(str(trace))
        seconds = communication(recorded.events(), len(self.steps))
        path = self.folder / f"communication_rank_{self.rank}.json"
        path.write_text(json.dumps({"steps": list(self.steps)} | seconds, indent=1) + "\n")
        if self.rank == 0:
            say(
                f"profiled steps {self.steps[0]} to {self.steps[-1]}: communication took "
                f"{seconds['communication']:.4f} s a step, {seconds['exposed']:.4f} s of it with "
                f"nothing computed meanwhile; trace in {trace}"
            )


def communication(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Seconds a step of exchanges between ranks, and of those beside which nothing was computed.

    events: torch.profiler's. On a GPU its kernels count, else the operators on the CPU.
    """
    events = list(events)
    on_gpu = any(event.device_type == DeviceType.CUDA for event in events)
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    exchanged: list[Span] = []
    computed: list[Span] = []
    for event in (event for event in events if event.device_type == device):
        span = (event.time_range.start, event.time_range.end)
        if event.name.startswith(EXCHANGES):
            exchanged.append(span)
        elif event.name.startswith("aten::") or (on_gpu and not event.is_user_annotation):
            computed.append(span)
    both = length(exchanged) + length(computed) - length(exchanged + computed)
    taken = length(exchanged)
    microseconds = {"communication": taken, "exposed": taken - both}
    return {name: value / steps / 1e6 for name, value in microseconds.items()}


def length(spans: list[Span]) -> float:
    """How long at least one of the spans runs."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
