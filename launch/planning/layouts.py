"""Which layout suits a model on a number of GPUs, and how large a model fits there.

Memory and bytes sent come from `cost`, seconds from `speed`. An estimate, not a promise: `make
bench` measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from configs.checks import divisors
from launch.planning import cost
from launch.planning.cost import LayoutPlan, ModelShape
from launch.planning.speed import GPU, step_seconds

if TYPE_CHECKING:
    from configs import Config


USABLE_MEMORY = 0.9  # the rest: CUDA context, communication buffers, fragmentation
# A simpler layout is worth this much time; the estimates cannot tell smaller differences anyway.
SIMPLER_WITHIN = 0.05


@dataclass(frozen=True)
class Estimate:
    """What one layout costs on one kind of GPU; bytes, seconds of a step, tokens/s of all GPUs."""

    layout: LayoutPlan
    memory: dict[str, int]
    seconds: dict[str, float]
    fits: bool

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.layout.step_tokens / self.step_seconds


def estimate(
    model: ModelShape, layout: LayoutPlan, gpu: GPU, sustained: float | None = None
) -> Estimate:
    """Memory and step time of one layout."""
    memory = cost.peak_memory(model, layout)
    fits = sum(memory.values()) <= USABLE_MEMORY * gpu.memory
    return Estimate(layout, memory, step_seconds(model, layout, gpu, sustained), fits)


def layout_of(config: Config, ranks: int) -> LayoutPlan:
    """The layout that a configuration asks for on `ranks` processes.

    Raises ValueError where the ranks or the global batch cannot be dealt out that way.
    """
    from l2e import select_layers  # brings torch

    parallel, train = config.parallel, config.train
    model_ranks = parallel.tensor * parallel.pipeline
    data, rest = divmod(ranks, model_ranks)
    if rest or not data:
        raise ValueError(
            f"{ranks} GPUs: not a multiple of parallel.tensor x parallel.pipeline = {model_ranks}; "
            "give a multiple, or change those keys"
        )
    accumulation, rest = divmod(train.global_batch_size, train.micro_batch_size * data)
    if rest or not accumulation:
        raise ValueError(
            f"train.global_batch_size = {train.global_batch_size}: not a multiple of "
            f"train.micro_batch_size x data-parallel ranks = {train.micro_batch_size} x {data}; "
            "change one of them or the number of GPUs"
        )
    return LayoutPlan(
        sequence_length=config.data.sequence_length,
        micro_batch_size=train.micro_batch_size,
        accumulation=accumulation,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        sequence=parallel.sequence,
        zero_stage=config.zero_stage,
        dtype=train.dtype,
        checkpointing=parallel.activation_checkpointing,
        inhibited_layers=len(select_layers(config.l2e.layers, config.model.num_layers)),
        compiling=train.compile is not False,
    )


def whole_batch(config: Config) -> LayoutPlan:
    """The configuration's global batch on one GPU: what every layout of it has in common."""
    train = config.train.model_copy(update={"micro_batch_size": 1})
    parallel = config.parallel.model_copy(update={"tensor": 1, "pipeline": 1, "sequence": False})
    return layout_of(config.model_copy(update={"train": train, "parallel": parallel}), 1)


def candidates(
    model: ModelShape, wanted: LayoutPlan, ranks: int, per_node: int
) -> Iterator[LayoutPlan]:
    """Every layout of `wanted`'s global batch on `ranks` GPUs that the trainer accepts.

    Tensor parallelism stays inside a node and divides the heads; pipelines take ZeRO-1 alone;
    fp16 and bf16 need ZeRO-1 or more.
    """
    batch = wanted.micro_batch_size * wanted.accumulation * wanted.data
    for tensor in divisors(min(per_node, ranks)):
        if model.num_attention_heads % tensor or ranks % tensor:
            continue
        for pipeline in divisors(ranks // tensor):
            data = ranks // tensor // pipeline
            if pipeline > model.num_layers or batch % data:
                continue
            for zero_stage in [1] if pipeline > 1 else [1, 2, 3]:
                for micro_batch_size in divisors(batch // data):
                    for checkpointing in (False, True):
                        yield replace(
                            wanted,
                            tensor=tensor,
                            pipeline=pipeline,
                            data=data,
                            sequence=tensor > 1,
                            zero_stage=zero_stage,
                            micro_batch_size=micro_batch_size,
                            accumulation=batch // data // micro_batch_size,
                            checkpointing=checkpointing,
                        )


def rank_layouts(
    model: ModelShape, wanted: LayoutPlan, ranks: int, gpu: GPU, sustained: float | None = None
) -> list[Estimate]:
    """Every candidate's estimate: those that fit first, fastest first.

    Of layouts within `SIMPLER_WITHIN` of the fastest the simplest comes first: less tensor and
    pipeline parallelism, no recomputation, a lower ZeRO stage; then the one asked for, then the
    faster to a percent, then less memory.
    """
    estimates = [
        estimate(model, layout, gpu, sustained)
        for layout in candidates(model, wanted, ranks, gpu.per_node)
    ]
    if not estimates:
        raise ValueError(
            f"no layout of {ranks} GPUs: the global batch must be a multiple of the data-parallel "
            "ranks, and tensor-parallel ranks must divide the attention heads; change --gpus or "
            "train.global_batch_size"
        )
    fastest = min((e.step_seconds for e in estimates if e.fits), default=0.0)

    def order(e: Estimate) -> tuple:
        if not e.fits:
            return (True, e.total_memory, complexity(e.layout))
        close = e.step_seconds < (1 + SIMPLER_WITHIN) * fastest
        rough = fastest if close else e.step_seconds
        percent = round(100 * e.step_seconds / fastest)
        return (False, rough, complexity(e.layout), e.layout != wanted, percent, e.total_memory)

    return sorted(estimates, key=order)


def complexity(layout: LayoutPlan) -> tuple[int, int, bool, int]:
    """What a practitioner would rather do without, worst first."""
    return (layout.pipeline, layout.tensor, layout.checkpointing, layout.zero_stage)


def fastest(ranked: list[Estimate]) -> Estimate:
    """The quickest of those that fit, however complicated."""
    return min((e for e in ranked if e.fits), key=lambda e: e.step_seconds)


@dataclass(frozen=True)
class UsualShape:
    """A GPT-NeoX of a usual form: heads of 128, hidden size 128 for each layer."""

    num_layers: int
    vocab_size: int = 50304

    @property
    def hidden_size(self) -> int:
        return 128 * self.num_layers

    @property
    def num_attention_heads(self) -> int:
        return self.num_layers

    @property
    def intermediate_size(self) -> int:
        return 4 * self.hidden_size


def largest_model(ranks: int, gpu: GPU, wanted: LayoutPlan) -> tuple[UsualShape, Estimate]:
    """The largest model of a usual form that fits on `ranks` GPUs, and its best layout.

    Only every fourth depth is tried. Raises ValueError where not even the smallest fits.
    """
    found = None
    for layers in range(4, 400, 4):
        shape = UsualShape(layers)
        try:
            best = rank_layouts(shape, wanted, ranks, gpu)[0]
        except ValueError:
            continue
        if best.fits:
            found = shape, best
        elif found is not None and layers > 2 * found[0].num_layers:
            break
    if found is None:
        raise ValueError(f"no model of a usual form fits on {ranks} x {gpu.name} with this batch")
    return found
