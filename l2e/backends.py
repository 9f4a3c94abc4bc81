"""Which implementation of the layer's arithmetic runs, and why: decided once for a kind of call.

`l2e.kernels` is the plain one, in torch operations, and the reference. `l2e.triton_kernels` makes
one pass over the activations on a GPU, `l2e.native_kernels` on a CPU; either is used where it
agrees with the plain one on this machine, in the very variant that the run needs.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from l2e import kernels
from l2e.config import L2EConfig
from l2e.kernels import Gradients, KernelArguments
from l2e.problems import first_line

# Largest difference from the plain backend, as a share of the largest value: rounding alone. The
# plain backend rounds a half-precision gradient twice, the kernel once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Backend:
    """An implementation of the functions of `l2e.kernels`, and why it was chosen."""

    name: str
    reason: str
    forward: Callable[[Tensor, KernelArguments, Tensor | None], Tensor]
    backward: Callable[[Tensor, Tensor, KernelArguments, Tensor | float, Tensor | None], Gradients]
    measure: Callable[[Tensor, KernelArguments, Tensor, Tensor, Tensor, Tensor], None]
    observe: Callable[[Tensor, KernelArguments, Tensor | None], tuple[Tensor, Tensor, float]]
    correct: Callable[..., None]

    def __str__(self) -> str:
        return f"{self.name} kernels ({self.reason})"


@dataclass(frozen=True)
class Variant:
    """What makes a difference to the compiled code."""

    selection: str
    method: str
    delta: float
    balanced: bool
    activation: str | None
    biased: bool
    neurons: int
    device: torch.device
    dtype: torch.dtype


def choose(
    config: L2EConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    neurons: int = 256,
    activation: str | None = "gelu",
    biased: bool = True,
) -> Backend:
    """The backend of a layer's calls. One warning tells of a GPU that goes without Triton, and of
    a fallback from what was asked for."""
    variant = Variant(
        config.selection,
        config.method,
        config.delta,
        config.scale_invariant,
        activation,
        biased,
        neurons,
        device,
        dtype,
    )
    return decide(config.kernels, variant)


@cache
def decide(wanted: str, variant: Variant) -> Backend:
    """Once for each variant, since finding out compiles kernels."""
    if wanted == "plain":
        return _plain("l2e.kernels is 'plain'")
    device = variant.device.type
    if wanted == "auto" and device == "cpu":
        return _native(variant)
    if wanted == "auto" and device != "cuda":
        return _plain(f"l2e.kernels is 'auto', and Triton is for GPUs, not {device}")
    problem = _why_not_triton(variant)
    if problem is None:
        from l2e import triton_kernels as fused

        reason = "equal to plain on this device"
        of_selected = kernels.observe, kernels.correct
        return Backend("triton", reason, fused.forward, fused.backward, fused.measure, *of_selected)
    backend = _plain(problem)
    logging.getLogger("l2e").warning("l2e: %s", backend)
    return backend


def _plain(reason: str) -> Backend:
    return _on_cpu("plain", reason, kernels)


def _on_cpu(name: str, reason: str, made_by: ModuleType) -> Backend:
    dense = kernels.forward, kernels.backward, kernels.measure
    return Backend(name, reason, *dense, made_by.observe, made_by.correct)


def _native(variant: Variant) -> Backend:
    from l2e import native_kernels

    if variant.dtype not in native_kernels.DTYPES:
        return _plain(f"no native kernel for {variant.dtype}")
    try:
        problem = _selected_otherwise(native_kernels, variant)
    except Exception as error:  # a compiler may fail in any way; training goes on without it
        problem = f"no native kernels: {first_line(error)}"
    if problem is not None:
        return _plain(problem)
    return _on_cpu("native", "equal to plain on this machine", native_kernels)


def _why_not_triton(variant: Variant) -> str | None:
    device = variant.device.type
    if variant.selection != "threshold":
        return f"{variant.selection} keeps a mask, which the Triton kernels do not read"
    if variant.method == "silence":
        return "silence computes nothing"
    if variant.dtype not in TOLERANCE:
        return f"no Triton kernel for {variant.dtype}"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a CUDA device, the activations are on {device}"
    try:
        from l2e import triton_kernels
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    try:
        return _disagreement(triton_kernels, variant)
    except Exception as error:
        return f"Triton failed: {type(error).__name__}: {first_line(error)}"


def _disagreement(fused, variant: Variant) -> str | None:
    """How the fused backend differs from the plain one on random numbers; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    neurons, device, dtype = variant.neurons, variant.device, variant.dtype
    pre, grad = (
        torch.randn(CHECKED_ROWS, neurons, generator=generator).to(device, dtype) for _ in range(2)
    )
    threshold = torch.full((neurons,), 1.5, dtype=torch.float32, device=device)
    arguments = KernelArguments(
        variant.activation,
        variant.method,
        variant.delta,
        torch.zeros_like(threshold),
        threshold,
        balance=threshold / 100 if variant.balanced else None,
        bias=grad[0] / 16 if variant.biased else None,
    )
    # What rounding could move over the threshold is not asked about.
    z = kernels.activate(arguments.biased(pre), variant.activation).float()
    pre = torch.where((z.square() / threshold - 1).abs() < 0.1, 0, pre)
    found, wanted = (_results(backend, pre, grad, arguments) for backend in (fused, kernels))
    for name, value in wanted.items():
        error = _error(found[name], value)
        if not error <= TOLERANCE[dtype]:
            return f"the Triton kernel's {name} differs from plain by {error:.1e} in {dtype}"
    return None


def _selected_otherwise(native: ModuleType, variant: Variant) -> str | None:
    """How the native kernels differ from the plain ones on random numbers, if they do.

    One subtraction and one product decide what is selected: it is the same to the bit.
    """
    generator = torch.Generator().manual_seed(0)
    shape, device = (CHECKED_ROWS, variant.neurons), variant.device
    pre = torch.randn(shape, generator=generator, dtype=torch.float32, device=device)
    pre, mean = pre.to(variant.dtype), torch.zeros_like(pre[0])
    arguments = KernelArguments(None, variant.method, variant.delta, mean, mean + 1.5)
    found, wanted = mean.new_zeros(2, 3 * len(mean) + 1)
    mine, theirs = native.observe(pre, arguments, found), kernels.observe(pre, arguments, wanted)
    if not torch.equal(mine[0].sort().values, theirs[0]):
        return "the native kernel selects other entries than plain"
    error = _error(found, wanted)
    if not error <= TOLERANCE[torch.float32]:
        return f"the native kernel's sums differ from plain by {error:.1e}"
    entries, values = torch.arange(pre.numel(), dtype=torch.int32, device=device), pre.float()
    for activation in kernels.APPROXIMATE:
        one, other = torch.empty_like(pre), torch.empty_like(pre)
        for made_by, to_pre in ((native, one), (kernels, other)):
            of_entries = entries, values.flatten()
            made_by.correct(to_pre, pre, pre, activation, *of_entries, scale=0.5, factor=0.1)
        error = _error(one, other)
        if not error <= TOLERANCE[variant.dtype]:
            return f"the native kernel's gradient differs from plain by {error:.1e}"
    return None


def _error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def _results(backend, pre: Tensor, grad: Tensor, arguments: KernelArguments) -> dict[str, Tensor]:
    sums = arguments.mean.new_zeros(3 * pre.shape[1] + 1)
    output = backend.forward(pre, arguments, sums)
    gradient, bias_gradient = backend.backward(grad, pre, arguments, 0.3, None)
    results = {"output": output, "sums": sums, "gradient": gradient}
    if arguments.method == "regularize":  # a variant of its own
        squares = sums.new_zeros(2)
        results["gradient, compared"] = backend.backward(grad, pre, arguments, 0.3, squares)[0]
        results |= {"arrived": squares[0], "direction": squares[1]}
    if bias_gradient is not None:
        results["bias gradient"] = bias_gradient
    return results
