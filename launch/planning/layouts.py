"""Which layout trains a model fastest on a number of GPUs, and how long a step takes there.

Memory and bytes sent come from `cost`; seconds come from a GPU's datasheet and a few plain
assumptions, all of them named here. An estimate, not a promise: `make bench` measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launch.planning import cost
from launch.planning.cost import Layout, ModelShape

if TYPE_CHECKING:
    from configs import Config


@dataclass(frozen=True)
class GPU:
    """Datasheet numbers of one GPU: dense bf16 and fp32 FLOP/s, bytes, and bytes/s each way."""

    name: str
    flops: float
    fp32_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float = 50e9  # one 400 Gbit/s port a GPU, between nodes
    per_node: int = 8


GPUS = {
    "a100": GPU("A100 80 GB", 312e12, 19.5e12, 80e9, 2.0e12, 300e9, network=25e9),
    "h100": GPU("H100 80 GB", 989e12, 67e12, 80e9, 3.35e12, 450e9),
    "h200": GPU("H200 141 GB", 989e12, 67e12, 141e9, 4.8e12, 450e9),
    "b200": GPU("B200 180 GB", 2250e12, 75e12, 180e9, 8.0e12, 900e9),
}

EFFICIENCY = 0.4  # share of the peak that a whole training step's arithmetic reaches
USABLE_MEMORY = 0.9  # the rest: CUDA context, communication buffers, fragmentation
BLOCK_KERNELS = 60  # launches of one block, forward and backward
KERNEL_SECONDS = 4e-6  # least time of one launch


@dataclass(frozen=True)
class Estimate:
    """What one layout costs on one kind of GPU; bytes, seconds of a step, tokens/s of all GPUs."""

    layout: Layout
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
    model: ModelShape, layout: Layout, gpu: GPU, efficiency: float = EFFICIENCY
) -> Estimate:
    """Memory and step time of one layout."""
    memory = cost.peak_memory(model, layout)
    fits = sum(memory.values()) <= USABLE_MEMORY * gpu.memory
    return Estimate(layout, memory, step_seconds(model, layout, gpu, efficiency), fits)


def step_seconds(
    model: ModelShape, layout: Layout, gpu: GPU, efficiency: float
) -> dict[str, float]:
    """Seconds of one optimizer step by what they are spent on; nothing is taken to overlap.

    arithmetic: the model's FLOPs, and a third more where the forward pass is run again, but no
        less than launching every kernel of a micro-batch takes.
    bubble: the share (stages - 1) / micro-batches of it that a pipeline's ends stand idle.
    tensor, pipeline, data, l2e: bytes sent over the link inside a node, or the network where a
        group is spread over nodes (ranks of one tensor group are neighbours, then data, then
        pipeline).
    update: gradients added up every micro-batch (two read, one written), then read with the
        optimizer's states, which are written back.
    """
    tokens = layout.step_tokens / layout.ranks
    flops = cost.flops_per_token(model, layout.sequence_length) * tokens
    peak = (gpu.fp32_flops if layout.dtype == "fp32" else gpu.flops) * efficiency
    blocks = cost.stage_blocks(model.num_layers, layout.pipeline, 0)
    launches = layout.accumulation * blocks * BLOCK_KERNELS * KERNEL_SECONDS
    arithmetic = max(flops / peak, launches) * (4 / 3 if layout.checkpointing else 1)
    sent = cost.communication(model, layout)
    data_speed = _bandwidth(gpu, layout.tensor * layout.data)
    parts = cost.peak_memory(model, layout)
    return {
        "arithmetic": arithmetic,
        "bubble": arithmetic * (layout.pipeline - 1) / layout.accumulation,
        "tensor": sent["tensor"] / _bandwidth(gpu, layout.tensor),
        "pipeline": sent["pipeline"] / _bandwidth(gpu, layout.ranks),
        "data": sent["data"] / data_speed,
        "l2e": sent["l2e"] / data_speed,
        "update": (3 * layout.accumulation * parts["gradients"] + 2 * parts["optimizer"])
        / gpu.memory_bandwidth,
    }


def _bandwidth(gpu: GPU, spread: int) -> float:
    return gpu.link if spread <= gpu.per_node else gpu.network


def layout_of(config: Config, ranks: int) -> Layout:
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
    return Layout(
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
        inhibited_layers=len(select_layers(config.l2e_settings.layers, config.model.num_layers)),
    )


def candidates(model: ModelShape, wanted: Layout, ranks: int, per_node: int) -> Iterator[Layout]:
    """Every layout of `wanted`'s global batch on `ranks` GPUs that the trainer accepts.

    Tensor parallelism stays inside a node and divides the heads; pipelines take ZeRO-1 alone;
    fp16 and bf16 need ZeRO-1 or more.
    """
    batch = wanted.micro_batch_size * wanted.accumulation * wanted.data
    for tensor in _divisors(min(per_node, ranks)):
        if model.num_attention_heads % tensor or ranks % tensor:
            continue
        for pipeline in _divisors(ranks // tensor):
            data = ranks // tensor // pipeline
            if pipeline > model.num_layers or batch % data:
                continue
            for zero_stage in [1] if pipeline > 1 else [1, 2, 3]:
                for micro_batch_size in _divisors(batch // data):
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
    model: ModelShape, wanted: Layout, ranks: int, gpu: GPU, efficiency: float = EFFICIENCY
) -> list[Estimate]:
    """Every candidate's estimate: those that fit first, fastest first.

    Of layouts within 1 % of each other the simpler one comes first: less tensor and pipeline
    parallelism, a lower ZeRO stage, no recomputation, then less memory.
    """
    estimates = [
        estimate(model, layout, gpu, efficiency)
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
        layout = e.layout
        simplicity = (layout.tensor, layout.pipeline, layout.zero_stage, layout.checkpointing)
        if not e.fits:
            return (True, e.total_memory, simplicity)
        seconds = fastest if e.step_seconds < 1.01 * fastest else e.step_seconds
        return (False, seconds, simplicity, e.total_memory)

    return sorted(estimates, key=order)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
