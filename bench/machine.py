"""Where a measurement was made, so that its numbers mean something later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "megatron-core", "deepspeed")


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine(device: torch.device) -> dict:
    """Hardware, versions and date."""
    return {
        "name": processor(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": date.today().isoformat(),
    }


def processor(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {instructions()}"


def kind(device: torch.device) -> str:
    """What results are kept apart by: cuda, or a CPU's vector instructions, such as cpu-avx2."""
    if device.type == "cuda":
        return "cuda"
    return f"cpu-{instructions().lower()}"


def instructions() -> str:
    """A CPU's fastest for matrix products: AMX, or the vector instructions that torch uses."""
    return "AMX" if torch.cpu._is_amx_tile_supported() else torch.backends.cpu.get_cpu_capability()


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself; emulated, a step takes minutes."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def version(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
