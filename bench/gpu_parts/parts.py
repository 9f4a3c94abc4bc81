"""The parts of `bench/gpu.py` by name: each measures one thing and saves what it has as it goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.gpu_parts import kernels, speed, training
from bench.gpu_parts.part import Part

PARTS: dict[str, Callable[..., None]] = {
    "machine": kernels.machine,
    "layer": kernels.layer,
    "loss": kernels.loss,
    "step": training.step,
    "training": training.training,
    "measuring": kernels.measuring,
    "speed": speed.speed,
    "peers": speed.peers,
    "attached": speed.attached,
    "resume": training.resume,
    "attention": kernels.attention,
}


def run(name: str, path: Path, smoke: bool, end: float) -> None:
    """Run one part."""
    part = Part(path, smoke, end)
    subject, _, preset = name.partition("_")
    with part.attempt(name):
        PARTS[subject](part, *([preset] if preset else []))
    part.save()
