"""What the machine can do: the peak that MFU is a share of."""

from __future__ import annotations

import time
from functools import cache

import torch

# Dense matrix peaks in FLOP/s by datasheet (bf16 and fp16; fp32 runs as TF32 where noted).
GPU_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


@cache
def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of one process's device: a GPU's datasheet figure, or what this CPU thread count
    reaches on one large matrix product (measured once, 0.2 s), so that MFU means something.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in GPU_PEAKS.items():
            if known in name:
                return peak if dtype != "fp32" else peak / 2
    return measured_peak(
        device, getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}.get(dtype, "float16"))
    )


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the best of a few square matrix products."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        product = a @ a
        product.flatten()[0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
