"""What to change where memory runs out: the plan by part, and the changes that cost least time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from l2e.memory import GIB
from launch.planning import cost
from launch.planning.cost import LayoutPlan, ModelShape
from launch.planning.layouts import layout_of
from launch.planning.speed import GPU, GPUS, step_seconds

if TYPE_CHECKING:
    from configs import Config

SHOWN = 3
WORTHWHILE = 0.02  # a remedy frees at least this share of the plan


class Remedy(NamedTuple):
    """A change of the configuration, the bytes a rank then needs, and its step's relative time."""

    change: str
    bytes: int
    time: float
    alike: bool  # the same numbers are trained, up to rounding, on the same processes


def advice(config: Config, ranks: int, gpu: GPU | None = None) -> str:
    """The memory plan by part, and the cheapest remedies, for a configuration on so many ranks."""
    layout, model = layout_of(config, ranks), config.model
    parts = cost.peak_memory(model, layout)
    plan = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    lines = [f"planned are {sum(parts.values()) / GIB:.2f} GiB a process (GiB: {plan})"]
    found = remedies(model, layout, gpu)
    if found:
        lines.append("what would help, the cheapest first:")
    for remedy in found:
        slower = f"{remedy.time - 1:+.0%} time a step" if remedy.alike else "another run"
        lines.append(f"  {remedy.change}: {remedy.bytes / GIB:.2f} GiB, {slower}")
    return "\n".join(lines)


def remedies(model: ModelShape, layout: LayoutPlan, gpu: GPU | None = None) -> list[Remedy]:
    """The `SHOWN` cheapest changes that free memory; those that train the same come first."""
    gpu = gpu or GPUS["h200"]
    before = sum(cost.peak_memory(model, layout).values())
    seconds = sum(step_seconds(model, layout, gpu).values())
    found = []
    for change, other, alike in changes(model, layout, gpu):
        size = sum(cost.peak_memory(model, other).values())
        time = sum(step_seconds(model, other, gpu).values()) / seconds
        if size <= (1 - WORTHWHILE) * before:
            found.append(Remedy(change, size, time, alike))
    return sorted(found, key=lambda remedy: (not remedy.alike, remedy.time))[:SHOWN]


def changes(
    model: ModelShape, layout: LayoutPlan, gpu: GPU
) -> Iterator[tuple[str, LayoutPlan, bool]]:
    """(what to set, the layout it makes, whether the same is trained) of single changes.

    Each keeps the trainer's rules (configs.checks) and, but for the last ones, the global batch.
    """
    micro, alone = layout.micro_batch_size, layout.pipeline == 1
    sequences = micro * layout.accumulation  # of a data-parallel rank and step
    smaller = [size for size in range(1, micro // 2 + 1) if sequences % size == 0]
    if smaller:
        size = smaller[-1]
        other = replace(layout, micro_batch_size=size, accumulation=sequences // size)
        yield f"train.micro_batch_size={size}", other, True
    if not layout.checkpointing:
        other = replace(layout, checkpointing=True)
        yield "parallel.activation_checkpointing=true", other, True
    if layout.data > 1 and alone:
        for stage in range(layout.zero_stage + 1, 4):
            other = replace(layout, zero_stage=stage)
            yield f"deepspeed.zero_optimization.stage={stage}", other, True
    if layout.tensor > 1 and not layout.sequence:
        yield "parallel.sequence=true", replace(layout, sequence=True), True
    tensor = 2 * layout.tensor
    fits = tensor <= gpu.per_node and model.num_attention_heads % tensor == 0
    if layout.data % 2 == 0 and fits:
        other = replace(
            layout, tensor=tensor, data=layout.data // 2, accumulation=2 * layout.accumulation
        )
        yield f"parallel.tensor={tensor}", other, True
    elif layout.data == 1 and fits:
        other = replace(layout, tensor=tensor)
        yield f"parallel.tensor={tensor} on {2 * layout.ranks} processes", other, False
    if layout.accumulation % 2 == 0 and layout.zero_stage > 0:
        other = replace(layout, data=2 * layout.data, accumulation=layout.accumulation // 2)
        yield f"{2 * layout.ranks} processes", other, False
    if layout.dtype == "fp32":
        yield "train.dtype=bf16", replace(layout, dtype="bf16"), False
    if layout.sequence_length > 1:
        shorter = layout.sequence_length // 2
        other = replace(layout, sequence_length=shorter)
        yield f"data.sequence_length={shorter}", other, False
