"""Which implementation of the layer's arithmetic runs, and why: decided once for a kind of call.

`l2e.kernels` is the plain one, in torch operations, and the reference. `l2e.triton_kernels` makes
one pass over the activations on a GPU; it is used only where it was asked for and agrees with
the plain one on this machine.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from l2e import kernels
from l2e.config import L2EConfig
from l2e.kernels import Gradients, KernelArguments

# Largest difference from the plain backend, as a share of the largest value: rounding alone. The
# plain backend rounds a half-precision gradient twice, the kernel once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@dataclass(frozen=True)
class Backend:
    """An implementation of `kernels.forward` and `kernels.backward`, and why it was chosen."""

    name: str
    reason: str
    forward: Callable[[Tensor, KernelArguments, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, KernelArguments, Tensor | float], Gradients]

    def __str__(self) -> str:
        return f"{self.name} kernels ({self.reason})"


def choose(config: L2EConfig, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a layer's calls; a fallback from what was asked for logs one warning."""
    return _choose(config.kernels, config.selection, config.method, device.type, dtype)


@cache
def _choose(wanted: str, selection: str, method: str, device: str, dtype: torch.dtype) -> Backend:
    if wanted == "plain":
        return _plain("l2e.kernels is 'plain'")
    problem = _why_not_triton(selection, method, device, dtype)
    if problem is None:
        from l2e import triton_kernels as fused

        return Backend("triton", "equal to plain on this device", fused.forward, fused.backward)
    backend = _plain(problem)
    logging.getLogger("l2e").warning("l2e: %s", backend)
    return backend


def _plain(reason: str) -> Backend:
    return Backend("plain", reason, kernels.forward, kernels.backward)


def _why_not_triton(selection: str, method: str, device: str, dtype: torch.dtype) -> str | None:
    if selection == "topk":
        return "topk keeps a mask, which the Triton kernels do not read"
    if method == "silence":
        return "silence computes nothing"
    if dtype not in TOLERANCE:
        return f"no Triton kernel for {dtype}"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a CUDA device, the activations are on {device}"
    try:
        from l2e import triton_kernels
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    try:
        return _disagreement(triton_kernels, torch.device(device), dtype)
    except Exception as error:  # a compiler may fail in any way; training goes on without it
        first_line = str(error).strip().partition("\n")[0]
        return f"Triton failed: {type(error).__name__}: {first_line}"


def _disagreement(fused, device: torch.device, dtype: torch.dtype) -> str | None:
    """How the fused backend differs from the plain one on random numbers; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    pre, grad = (torch.randn(300, 70, generator=generator).to(device, dtype) for _ in range(2))
    mean, threshold = torch.zeros(70, device=device), torch.full((70,), 1.5, device=device)
    arguments = KernelArguments("gelu", "regularize", 1.0, mean, threshold, bias=pre[0])
    found, wanted = (_results(backend, pre, grad, arguments) for backend in (fused, kernels))
    for name, value in wanted.items():
        error = (found[name].double() - value.double()).abs().max() / value.double().abs().max()
        if not error <= TOLERANCE[dtype]:
            return f"the Triton kernel's {name} differs from plain by {error:.1e} in {dtype}"
    return None


def _results(backend, pre: Tensor, grad: Tensor, arguments: KernelArguments) -> dict[str, Tensor]:
    sums = torch.zeros(3 * pre.shape[1] + 1, device=pre.device)
    output = backend.forward(pre, arguments, sums)
    gradient, bias_gradient = backend.backward(grad, pre, arguments, 0.3)
    return {
        "output": output,
        "sums": sums,
        "gradient": gradient,
        "bias gradient": bias_gradient,
    }
