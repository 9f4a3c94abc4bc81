"""What the machine can do: the peak that MFU is a share of."""

from __future__ import annotations

import platform
import time
from functools import cache

import torch

from configs import Config, ConfigError, Problem
from launch.runtime.planning import GPUS

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def refuse_unsupported(config: Config) -> None:
    """Raise a ConfigError for what this machine cannot run, before anything is started."""
    if torch.cuda.is_available():
        return
    problems = []
    if config.parallel.sequence:
        reason = "megatron-core's sequence parallelism needs CUDA, and there is none here"
        problems.append(Problem("parallel.sequence", True, reason, "set it to false"))
    if config.train.dtype == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        reason = "this processor has no fp16 arithmetic"
        problems.append(Problem("train.dtype", "fp16", reason, "set it to bf16 or fp32"))
    if problems:
        raise ConfigError("this machine", problems)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process"


def datasheet_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU that is known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.flops for known, gpu in GPUS.items() if known.upper() in name), None)


@cache
def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of one process's device: a known GPU's datasheet figure (half of it for fp32, which
    runs as TF32), elsewhere the best of a few matrix products measured now (0.1 s)."""
    peak = datasheet_peak(device)
    if peak is None:
        return measured_peak(device, TORCH_DTYPES[dtype])
    return peak / 2 if dtype == "fp32" else peak


def describe_peak(device: torch.device, dtype: str) -> str:
    """The peak in words, and where it comes from."""
    source = "measured" if datasheet_peak(device) is None else "datasheet"
    return f"{peak_flops(device, dtype) / 1e12:.3g} TFLOP/s, {source}"


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the best of a few square matrix products."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
