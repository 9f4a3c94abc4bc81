"""What all parts of `bench/gpu.py` share: what one found, shapes, and clocks."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.machine import default_device
from model.config import ModelConfig

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else default_device()  # as tensors name theirs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Pythia's shapes in training: micro-batch, and so tokens and neurons of a layer.
SHAPES = {"70m": (32, 2048), "410m": (16, 2048), "2.8b": (4, 2048)}
TINY = ModelConfig.model_validate(
    {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
)


class Part:
    """What one part found, saved with every addition; `end` is when the bench has to stop."""

    def __init__(self, path: Path, smoke: bool, end: float) -> None:
        self.path, self.smoke, self.end = path, smoke, end
        self.begin = time.monotonic()
        self.left_over = torch.cuda.memory_allocated() if CUDA else 0  # bytes, by earlier parts
        self.found: dict[str, Any] = {"failed": []}

    @property
    def left(self) -> float:
        """Seconds until the bench has to stop."""
        return self.end - time.monotonic()

    @property
    def peak_gigabytes(self) -> float:
        """Of this part's own memory on the GPU, since its peak was last reset."""
        return (torch.cuda.max_memory_allocated() - self.left_over) / 1e9

    def save(self, **more: Any) -> None:
        """Keep `more` and print it."""
        self.found |= more | {"seconds": round(time.monotonic() - self.begin, 1)}
        self.path.write_text(json.dumps(self.found, default=str) + "\n")
        for name, value in more.items():
            print(f"[{self.path.stem} {self.found['seconds']:5.1f}] {name}: {value}", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A failure ends this attempt alone, and its memory is freed."""
        try:
            yield
        except Exception as error:
            self.fail(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            traceback.print_exc()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()

    def fail(self, why: str) -> None:
        """Remember what went wrong or is out of its tolerance."""
        self.save(failed=[*self.found["failed"], why])


def drain() -> None:
    """Wait for the GPU."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(part: Part, call: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call, by the device's own events."""
    taken = []
    for turn in range(1 if part.smoke else rounds + 3):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        if part.smoke or turn >= 3:
            taken.append(1e3 * seconds)
    return sorted(taken)[len(taken) // 2]


def kernel_times(call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """(kernel, launches, milliseconds) of a call, longest first, all of them summed first."""
    from torch.profiler import DeviceType, profile

    with profile() as recorded:
        call()
        drain()
    rows = [
        (event.key[:90], event.count, round(event.self_device_time_total / 1e3, 3))
        for event in recorded.key_averages()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    rows.sort(key=lambda row: -row[2])
    total = ("all kernels", sum(row[1] for row in rows), round(sum(row[2] for row in rows), 3))
    return [total, *rows[:28]]
