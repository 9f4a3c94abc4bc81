"""L2E's layer alone: what the threshold and MEmeL's top k cost beside plain GELU, as N grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.contenders import DTYPES
from bench.timing import estimate, interleave
from l2e import Controller, L2EConfig, L2ELayer

NEURONS = (512, 2048, 4096, 10240)  # Pythia 14M, 70M, 410M, 2.8B
L2E: dict[str, Any] = {"late_start_step": 1}
LAYERS = {
    "threshold": L2EConfig(**L2E),
    "top 1": L2EConfig(method="deactivate", selection="topk", topk=1, **L2E),
    "top 50": L2EConfig(method="deactivate", selection="topk", topk=50, **L2E),
}


def measure(
    dtype: str, rounds: int, device: torch.device, entries: int | None = None
) -> list[dict]:
    """For each N: nanoseconds an activation, forward and backward, with 95 % intervals."""
    entries = entries or (2**26 if device.type == "cuda" else 2**20)
    rows = []
    for neurons in NEURONS:
        shape = (entries // neurons, neurons)
        generator = torch.Generator().manual_seed(0)
        pre = torch.randn(shape, generator=generator).to(device, DTYPES[dtype]).requires_grad_()
        gradient = torch.randn(shape, generator=generator).to(device, DTYPES[dtype])
        layers = LAYERS
        if device.type == "cuda":
            layers = LAYERS | {"threshold, Triton": L2EConfig(kernels="triton", **L2E)}
        calls: dict[str, Callable[[], object]] = {"GELU": gelu_call(pre, gradient)}
        calls |= {name: layer_call(config, pre, gradient) for name, config in layers.items()}
        taken = interleave(calls, rounds)
        scale = 1e9 / pre.numel()
        rows.append(
            {"neurons": neurons, "dtype": dtype}
            | {n: estimate([scale * s for s in seconds]).as_dict() for n, seconds in taken.items()}
        )
    return rows


def gelu_call(pre: torch.Tensor, gradient: torch.Tensor) -> Callable[[], object]:
    """Plain GELU, forward and backward."""
    return lambda: torch.autograd.grad(torch.nn.functional.gelu(pre), pre, gradient)


def layer_call(
    config: L2EConfig, pre: torch.Tensor, gradient: torch.Tensor
) -> Callable[[], object]:
    """An L2E layer's forward and backward, after two steps, so that it selects."""
    layer = L2ELayer(pre.shape[1], config, name="0", inhibited_layers=1).train()
    controller = Controller([layer], config)

    def call() -> object:
        return torch.autograd.grad(layer(pre), pre, gradient)

    for _ in range(2):
        call()
        controller.step()
    return call
