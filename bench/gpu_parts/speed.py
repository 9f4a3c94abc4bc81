"""Parts of whole steps of one model: L2E off and on in turn, and other people's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import contenders
from bench.contenders import Step, Workload, megatron_step, one_process, our_steps
from bench.gpu_parts.part import (
    CUDA,
    DEVICE,
    SHAPES,
    TINY,
    Part,
    drain,
)
from bench.timing import added, estimate, interleave
from l2e import L2EConfig
from launch.planning.cost import flops_per_token
from model.config import ModelConfig


def speed(part: Part, preset: str) -> None:
    """L2E off, on two layers, on all, and MEmeL's top k, compiled, taking turns."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # the variants share a block's code
    off = "ours"
    variants = {
        off: None,
        "l2e mid2": L2EConfig(layers="mid2", late_start_step=1),
        "l2e all": L2EConfig(layers="all", late_start_step=1),
        "MEmeL top-k mid2": contenders.VARIANTS["ours + MEmeL top-k mid2"],
        "l2e mid2, plain kernels": L2EConfig(layers="mid2", late_start_step=1, kernels="plain"),
    }
    if preset == "2.8b":  # a state for each of 32 layers
        variants.pop("l2e all")
    with one_process(DEVICE), fast_weights():
        work = workload(part, preset)
        begin = time.monotonic()
        steps = our_steps(work, variants, compiled=CUDA)
        timed(part, work, steps, off, begin)


def peers(part: Part, preset: str) -> None:
    """transformers, compiled, and megatron-core: one at a time, so that a failure is its own."""
    with one_process(DEVICE), fast_weights():
        work = workload(part, preset)

        def transformers() -> Step:
            return contenders.transformers_step(work, compiled=CUDA)

        for name, build in (
            ("ours", lambda: our_steps(work, {"ours": None}, compiled=CUDA)["ours"]),
            ("transformers, compiled", transformers),
            ("megatron-core", lambda: megatron_step(work)),
        ):
            with part.attempt(name):
                begin = time.monotonic()
                timed(part, work, {name: build()}, name, begin)


def attached(part: Part) -> None:
    """What `l2e.attach` adds to a step of transformers' 70M, as it is and compiled."""
    with one_process(DEVICE), fast_weights():
        work = workload(part, "70m")
        for off, compiled in (("transformers", False), ("transformers, compiled", True)):
            if compiled and not CUDA:
                continue
            with part.attempt(off):
                begin = time.monotonic()
                config = L2EConfig(layers="mid2", late_start_step=1)
                steps = {
                    off: contenders.transformers_step(work, compiled=compiled),
                    f"{off}, l2e attached to mid2": contenders.transformers_step(
                        work, compiled=compiled, attached=config
                    ),
                }
                timed(part, work, steps, off, begin)


def workload(part: Part, preset: str) -> Workload:
    """One micro-batch of a Pythia shape; weights are drawn where they will be."""
    if part.smoke:
        return Workload(TINY, 2, 64, "fp32", DEVICE)
    batch, length = SHAPES[preset]
    return Workload(ModelConfig.model_validate({"preset": preset}), batch, length, "bf16", DEVICE)


def timed(part: Part, work: Workload, steps: dict[str, Step], off: str, begin: float) -> None:
    """Interleaved seconds of the steps, with 95 % intervals."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for call in steps.values():
        call()
        call()
    drain()
    ready = time.monotonic() - begin
    taken = interleave(steps, 2 if part.smoke else 15, warmup=1)
    flops = flops_per_token(work.config, work.sequence_length) * work.tokens
    for name, seconds in taken.items():
        median = estimate(seconds)
        row: dict[str, Any] = {
            "seconds": median.as_dict(),
            "tokens_per_second": work.tokens / median.median,
            "tflops": flops / median.median / 1e12,
        }
        if name != off:
            row["added_percent"] = added(taken, name, off).as_dict()
        part.save(**{name: row})
    peak = part.peak_gigabytes if CUDA else None
    part.save(**{f"{off}: build, compile, two steps": round(ready, 1), f"{off}: peak GB": peak})


@contextmanager
def fast_weights() -> Iterator[None]:
    """Models are built with weights drawn on the device: drawing 2.8B on the host takes minutes."""
    import model.attention
    import model.embedding
    import model.mlp

    modules = (model.attention, model.embedding, model.mlp)
    placed = Workload.place

    def place(self: Workload, built: torch.nn.Module) -> torch.nn.Module:
        built = placed(self, built)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
        return built

    with ExitStack() as replaced:
        for module in modules:
            replaced.enter_context(patch.object(module, "initializer", lambda *_, **__: _as_it_is))
        replaced.enter_context(patch.object(Workload, "place", place))
        yield


def _as_it_is(weight: Tensor) -> Tensor:
    return weight
