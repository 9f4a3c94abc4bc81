"""Parts of single operations: the machine's roofs, the layer's kernels, loss and attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contenders import one_process
from bench.gpu_parts.part import (
    CUDA,
    DEVICE,
    DTYPES,
    SHAPES,
    TINY,
    Part,
    kernel_times,
    milliseconds,
)
from bench.machine import describe_machine
from l2e import Controller, L2EConfig, L2ELayer, kernels
from l2e.kernels import KernelArguments
from model.config import ModelConfig

# Largest relative error against float64 (2-norm). The interpreter truncates to bf16.
LAYER_LIMITS = {"fp32": 1e-5, "bf16": 1e-2 if CUDA else 3e-2, "fp16": 2e-3}
MOST_LAUNCHES = 20  # of the controller's step, for any number of layers
LAYER_CASES = [
    ("gelu", "regularize", False),
    ("gelu", "deactivate", False),
    ("gelu", "none", False),
    ("gelu_tanh", "regularize", True),
    (None, "regularize", False),
]


def machine(part: Part) -> None:
    """Versions, and the speed of a copy and of a matrix product: the roofs of what follows."""
    part.save(machine=describe_machine(DEVICE))
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        part.save(memory_bytes=properties.total_memory, sms=properties.multi_processor_count)
    part.save(copy_bytes_per_second=copy_speed(part))
    size = 64 if part.smoke else 8192
    x, y = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    part.save(bf16_flops=2 * size**3 / milliseconds(part, lambda: x @ y) * 1e3)


def copy_speed(part: Part) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.zeros(2**14 if part.smoke else 2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * len(source) / milliseconds(part, lambda: target.copy_(source), 5) * 1e3


def layer(part: Part) -> None:
    """Both kinds of kernels against float64; their time against the memory's."""
    from l2e import triton_kernels

    shapes = [(300, 70)] if part.smoke else [(4133, 2048), (4096, 2048), (1000, 10240), (777, 333)]
    cases = LAYER_CASES[:2] if part.smoke else LAYER_CASES
    worst: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        for case in cases:
            for shape in shapes if case == cases[0] else shapes[:2]:
                for kind, made_by in (("plain", kernels), ("triton", triton_kernels)):
                    with part.attempt(f"{kind} {name} {case} {shape}"):
                        errors = layer_errors(made_by, shape, dtype, *case)
                        for what, error in errors.items():
                            key = f"{kind} {name} {what}"
                            worst[key] = max(worst.get(key, 0.0), error)
                            if not error <= LAYER_LIMITS[name]:
                                part.fail(f"{kind} {name} {case} {shape}: {what} {error:.1e}")
        part.save(worst_relative_errors={k: float(f"{v:.2e}") for k, v in worst.items()})
    copy = copy_speed(part)
    for preset, (batch, length) in SHAPES.items():
        tokens, neurons = (
            batch * length,
            ModelConfig.model_validate({"preset": preset}).intermediate_size,
        )
        if part.smoke:
            tokens, neurons = 64, 64
        with part.attempt(f"time {preset}"):
            part.save(**{f"time_{preset}": layer_times(part, tokens, neurons, copy)})


def layer_errors(
    made_by: Any,
    shape: tuple[int, int],
    dtype: torch.dtype,
    activation: str | None,
    method: str,
    balanced: bool,
) -> dict[str, float]:
    """Relative errors of all that a pass gives, against float64 that rounds where storage does."""
    neurons = shape[1]
    generator = torch.Generator(device=DEVICE).manual_seed(neurons)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    pre, grad, bias = (
        (1.5 * draw(*shape)).to(dtype),
        draw(*shape).to(dtype),
        draw(neurons).to(dtype),
    )
    mean, threshold = 0.3 * draw(neurons), draw(neurons).abs() + 0.5
    balance = threshold / 100 if balanced else None
    arguments = KernelArguments(
        activation, method, 1.5, mean, threshold, balance=balance, bias=bias
    )
    sums = torch.zeros(3 * neurons + 1, device=DEVICE)
    out = made_by.forward(pre, arguments, sums)
    to_pre, to_bias = made_by.backward(grad, pre, arguments, 0.3)

    x = (pre.float() + bias.float()).to(dtype).double().requires_grad_()
    z = x if activation is None else F.gelu(x, approximate=kernels.APPROXIMATE[activation])
    stored = z.detach().to(dtype)
    d = stored.double() - mean.double()
    selected = (stored.float() - mean).square() >= threshold
    wanted, g = z.detach(), grad.double()
    if method == "deactivate":
        wanted = torch.where(selected, mean.to(dtype).double(), wanted)
        g = torch.where(selected, -1.5 * g, g)
    elif method == "regularize":
        direction = torch.where(selected, 1 / torch.where(selected, d, 1), 0)
        g = g + 0.6 * (direction if balance is None else direction - d * balance.double())
    (gradient,) = torch.autograd.grad(z, x, g)
    # Either choice is right for what rounding can move over the threshold.
    near = (d.square() - threshold).abs() < 0.02 * threshold
    errors = {
        "output": relative(torch.where(near, wanted, out.double()), wanted),
        "gradient": relative(torch.where(near, gradient, to_pre.double()), gradient),
        "deviations": relative(sums[:neurons], d.sum(0)),
        "squares": relative(sums[neurons : 2 * neurons], d.square().sum(0)),
        "selected": relative(sums[2 * neurons : -1].sum(), selected.sum()),
        "bias gradient": relative(to_bias, to_pre.double().sum(0)),
        "not repeated": float((made_by.forward(pre, arguments, sums) != out).sum()),
    }
    if method == "regularize":
        logs = torch.where(selected, d.square(), 1).log().sum()
        errors["logs"] = relative(sums[-1] / 2, logs)  # the repetition added them again
    return errors


def layer_times(part: Part, tokens: int, neurons: int, copy: float) -> dict[str, Any]:
    """Milliseconds and the share of the memory's speed, also of methods that compute more."""
    from l2e import triton_kernels

    # Several inputs in turn, so that none comes from a cache.
    inputs = [(1.5 * torch.randn(tokens, neurons, device=DEVICE)).bfloat16() for _ in range(3)]
    grad = torch.randn(tokens, neurons, device=DEVICE).bfloat16()
    mean, threshold = (
        torch.zeros(neurons, device=DEVICE),
        torch.full((neurons,), 4.0, device=DEVICE),
    )
    bias, sums = mean.bfloat16(), torch.zeros(3 * neurons + 1, device=DEVICE)
    usual = KernelArguments("gelu", "regularize", 1.0, mean, threshold, bias=bias)
    invariant = replace(usual, balance=threshold / 100)
    turn = [0]

    def pre() -> Tensor:
        turn[0] = (turn[0] + 1) % len(inputs)
        return inputs[turn[0]]

    def both(
        made_by: Any, arguments: KernelArguments = usual, squares: Tensor | None = None
    ) -> tuple[float, float]:
        def backward() -> None:
            made_by.backward(grad, pre(), arguments, 0.3, squares)

        rounds = 3 if made_by is kernels else 20
        forward = milliseconds(part, lambda: made_by.forward(pre(), arguments, sums), rounds)
        return forward, milliseconds(part, backward, rounds)

    gelu = (
        milliseconds(part, lambda: F.gelu(pre())),
        milliseconds(part, lambda: torch.ops.aten.gelu_backward(grad, pre())),
    )
    times = {
        "gelu": gelu,
        "plain": both(kernels),
        "triton": both(triton_kernels),
        "triton, deactivate": both(triton_kernels, replace(usual, method="deactivate")),
        "triton, scale-invariant": both(triton_kernels, invariant),
        "triton, comparing gradients": both(triton_kernels, invariant, sums.new_zeros(2)),
    }
    least = [1e3 * tokens * neurons * moved / copy for moved in (4, 6)]
    return {
        name: {
            f"{way}_{what}": round(value, 4)
            for way, ms, floor in zip(("forward", "backward"), pair, least, strict=True)
            for what, value in (("ms", ms), ("of_memory_speed", floor / ms))
        }
        for name, pair in times.items()
    }


def loss(part: Part) -> None:
    """The cross-entropy against float64, and its time beside its matrix products'."""
    from megatron.core import parallel_state

    from model.loss import cross_entropy, fused_softmax

    with one_process(DEVICE):
        group = parallel_state.get_tensor_model_parallel_group()
        for name, dtype in DTYPES.items():
            with part.attempt(name):
                fused = fused_softmax(DEVICE, dtype, group) is not None
                errors = loss_errors(part, dtype, group)
                part.save(**{f"loss_{name}": {"triton": fused} | errors})
                if not max(errors.values()) <= {"fp32": 1e-5}.get(name, 1e-2):
                    part.fail(f"{name}: {errors}")
        for preset, (batch, length) in SHAPES.items():
            config = TINY if part.smoke else ModelConfig.model_validate({"preset": preset})
            tokens = 64 if part.smoke else batch * length
            h, w, y = loss_inputs(tokens, config.hidden_size, config.vocab_size, torch.bfloat16)

            def ours(h=h, w=w, y=y, config=config) -> None:
                cross_entropy(h, w, y, config.vocab_size, group).backward()

            def products(h=h, w=w) -> None:
                for part_of_h in h.detach().split(8192):
                    logits = part_of_h @ w.detach().t()
                    logits @ w.detach()
                    logits.t() @ part_of_h

            with part.attempt(preset):
                times = {"ours_ms": milliseconds(part, ours, 5)}
                times["products_ms"] = milliseconds(part, products, 5)
                beyond = (times["ours_ms"] - times["products_ms"]) / 1e3
                times["nanoseconds_a_logit_beyond"] = 1e9 * beyond / tokens / config.vocab_size
                part.save(**{f"time_{preset}": times})


def loss_inputs(
    tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output embedding and labels."""
    h = torch.randn(tokens, hidden, device=DEVICE).to(dtype).requires_grad_()
    w = (0.05 * torch.randn(vocabulary, hidden, device=DEVICE)).to(dtype).requires_grad_()
    return h, w, torch.randint(vocabulary, (tokens,), device=DEVICE)


def loss_errors(part: Part, dtype: torch.dtype, group: Any) -> dict[str, float]:
    """Relative errors of the loss and its gradients, with rows that take no part."""
    from model.loss import cross_entropy

    tokens, hidden, rows = (70, 64, 1024) if part.smoke else (3000, 512, 50304)
    vocabulary = rows - 50
    h, w, y = loss_inputs(tokens, hidden, rows, dtype)
    y = y.clamp(max=vocabulary - 1)
    value = cross_entropy(h, w, y, vocabulary, group)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    (value * scale).backward()
    exact_h, exact_w = (t.detach().double().requires_grad_() for t in (h, w))
    exact = F.cross_entropy((exact_h @ exact_w.t())[:, :vocabulary], y)
    exact.backward()
    assert h.grad is not None
    assert w.grad is not None
    assert exact_h.grad is not None
    assert exact_w.grad is not None
    return {
        "loss": abs(value.item() / exact.item() - 1),
        "to_hidden": relative(h.grad / scale, exact_h.grad),
        "to_weight": relative(w.grad / scale, exact_w.grad),
    }


def relative(found: Tensor, wanted: Tensor) -> float:
    """The 2-norm of the error over that of what was wanted."""
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


def measuring(part: Part) -> None:
    """What measuring costs one layer: time and memory; and how long the controller's step takes."""
    for preset in ("70m", "2.8b"):
        batch, length = SHAPES[preset]
        tokens, neurons = (
            batch * length,
            ModelConfig.model_validate({"preset": preset}).intermediate_size,
        )
        if part.smoke:
            tokens, neurons = 64, 64
        with part.attempt(preset):
            config = L2EConfig(late_start_step=1)
            inhibitors = [
                L2ELayer(neurons, config, name=str(n), inhibited_layers=2).train().to(DEVICE)
                for n in range(2)
            ]
            controller = Controller(inhibitors, config)
            pre = torch.randn(tokens, neurons, device=DEVICE).bfloat16().requires_grad_()
            grad = torch.randn_like(pre)

            def call(pre=pre, grad=grad, inhibitors=inhibitors) -> None:
                for inhibitor in inhibitors:
                    torch.autograd.grad(inhibitor(pre), pre, grad)

            found: dict[str, Any] = {}
            for _ in range(3):
                call()
                controller.step()
            for measured in (False, True):
                controller.measure = measured
                kind = "measured" if measured else "plain"
                if CUDA:
                    torch.cuda.reset_peak_memory_stats()
                found[f"{kind}_ms"] = milliseconds(part, call, 5)
                if CUDA:
                    found[f"{kind}_peak_GB"] = part.peak_gigabytes
            call()
            found["controller_step_ms"] = milliseconds(part, controller.step, 10)
            if CUDA:
                found["controller_kernels"] = kernel_times(controller.step)
                found["controller_launches"] = found["controller_kernels"][0][1]
            part.save(**{preset: found})
            if not found.get("controller_launches", 0) <= MOST_LAUNCHES:
                part.fail(f"{preset}: the controller's step launches more than {MOST_LAUNCHES}")


def attention(part: Part) -> None:
    """Which kernels torch chose for attention, and their time."""
    from model.attention import Attention

    with one_process(DEVICE):
        for preset in ("70m", "2.8b"):
            with part.attempt(preset):
                batch, length = (1, 64) if part.smoke else SHAPES[preset]
                config = TINY if part.smoke else ModelConfig.model_validate({"preset": preset})
                module = Attention("attention", config, seed=0, sequence_parallel=False)
                module = module.to(DEVICE, torch.bfloat16)
                shape = (length, batch, config.hidden_size)
                x = torch.randn(shape, device=DEVICE).bfloat16().requires_grad_()

                def call(module=module, x=x) -> None:
                    module(x).sum().backward()

                found = {"head_dim": config.head_dim, "ms": milliseconds(part, call, 5)}
                part.save(**{preset: found | ({"kernels": kernel_times(call)[:8]} if CUDA else {})})
