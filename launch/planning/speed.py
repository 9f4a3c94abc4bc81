"""How long a training step takes on a kind of GPU: one physical model for every size and layout.

A micro-batch on one rank is matrix products, attention, what moves between them through the GPU's
memory, and at least one launch a kernel; ranks exchange bytes over links, partly while they
compute. Every constant below is a property of GPUs or of the training step, none of a model. Held
against ten published speeds of other stacks (MPT with FSDP on A100 and H100, Megatron-LM on A100)
it is 9 % off on average and 18 % at worst, and against this project's own steps (70M, 410M and 2.8B
on one H100, 70M on one H200) 1 to 20 %: see tests/launch/planning/test_speed.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning import cost
from launch.planning.cost import BYTES, LayoutPlan, ModelShape
from model.config import padded_vocab_size


@dataclass(frozen=True)
class GPU:
    """Datasheet numbers of one GPU: dense bf16 and fp32 FLOP/s, bytes, and bytes/s each way.

    `sustained` is the share of the datasheet's FLOP/s that large matrix products keep up through
    a training step, under the power limit: by what others published (A100, software of 2023), by
    this project's own step (H200, PyTorch 2.11), and for the H100, the same chip, between both:
    what others published of it asks for 0.50, this project's own steps for 0.70.
    """

    name: str
    flops: float
    fp32_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    sustained: float
    network: float = 50e9  # one 400 Gbit/s port a GPU, between nodes
    per_node: int = 8


GPUS = {
    "a100": GPU("A100 80 GB", 312e12, 19.5e12, 80e9, 2.0e12, 300e9, 0.70, network=25e9),
    "h100": GPU("H100 80 GB", 989e12, 67e12, 80e9, 3.35e12, 450e9, 0.56),
    "h200": GPU("H200 141 GB", 989e12, 67e12, 141e9, 4.8e12, 450e9, 0.65),
    "b200": GPU("B200 180 GB", 2250e12, 75e12, 180e9, 8.0e12, 900e9, 0.55),
}

UNCERTAINTY = 0.2  # nine in ten real steps should lie within this share of an estimate

HALF_SIZE = 128  # a product's dimension at which its matrix units are half used
ATTENTION = 0.5  # fused attention's FLOP/s as a share of a large product's
BANDWIDTH = 0.9  # share of the memory's datasheet bandwidth that streaming kernels reach
LINK = 0.7  # share of a link's datasheet bandwidth that collectives reach
EXPOSED = 0.1  # share of data-parallel communication that no computing hides
HIDDEN_BY = 0.6  # share of a step's computing beside which it can run: mostly the backward pass
OUTSIDE_PASSES = 60  # reads and writes of [tokens, hidden] by a block's norms, sums and copies
OUTSIDE_PASSES_COMPILED = 24  # by fewer kernels (from a profile of 70M on an H100)
INSIDE_PASSES = 6  # of [tokens, intermediate] by its non-linearity
LOSS_BYTES = 7  # a logit, beyond the matrix products (counted: 6.8 to 7.6)
L2E_BYTES = 6  # an inhibited activation, beyond the plain non-linearity (measured on an H200)
BLOCK_KERNELS = 60  # launches of one block, forward and backward
KERNEL_SECONDS = 4e-6  # least time of one launch


class Clock:
    """Seconds that one GPU takes for products and for bytes, in one dtype."""

    def __init__(self, gpu: GPU, dtype: str, sustained: float | None = None) -> None:
        peak = gpu.fp32_flops if dtype == "fp32" else gpu.flops
        self.flops = peak * (gpu.sustained if sustained is None else sustained)
        self.bandwidth = gpu.memory_bandwidth * BANDWIDTH
        self.element = BYTES[dtype]

    def product(self, m: float, n: float, k: float) -> float:
        """[m, k] @ [k, n]: by its arithmetic, slower where a dimension is small, or its bytes."""
        used = m / (m + HALF_SIZE) * n / (n + HALF_SIZE) * k / (k + HALF_SIZE)
        arithmetic = 2 * m * n * k / (self.flops * used)
        return max(arithmetic, self.moved(self.element * (m * k + k * n + m * n)))

    def linear(self, tokens: float, inputs: float, outputs: float) -> float:
        """Forward, the gradient of its input, and the gradient of its weight."""
        forward = self.product(tokens, outputs, inputs)
        return (
            forward + self.product(tokens, inputs, outputs) + self.product(inputs, outputs, tokens)
        )

    def attention(self, tokens: float, length: int, hidden: float) -> float:
        """Scores and their use, forward and backward; the causal half alone is computed."""
        return 6 * hidden * length * tokens / (self.flops * ATTENTION)

    def moved(self, size: float) -> float:
        """Bytes through the GPU's memory."""
        return size / self.bandwidth


def block_seconds(model: ModelShape, layout: LayoutPlan, clock: Clock) -> float:
    """One block, one micro-batch, forward and backward, without exchanges between ranks."""
    tokens, ranks = layout.micro_tokens, layout.tensor
    hidden, own = model.hidden_size, model.hidden_size / ranks
    inner = model.intermediate_size / ranks
    products = (
        clock.linear(tokens, hidden, 3 * own)
        + clock.linear(tokens, own, hidden)
        + clock.linear(tokens, hidden, inner)
        + clock.linear(tokens, inner, hidden)
    )
    passes = OUTSIDE_PASSES_COMPILED if layout.compiled else OUTSIDE_PASSES
    outside = passes * hidden / (ranks if layout.sequence else 1)
    moved = clock.moved(tokens * clock.element * (outside + INSIDE_PASSES * inner))
    computed = products + clock.attention(tokens, layout.sequence_length, own) + moved
    return max(computed, BLOCK_KERNELS * KERNEL_SECONDS)


def head_seconds(model: ModelShape, layout: LayoutPlan, clock: Clock) -> float:
    """The output embedding and the cross-entropy of one micro-batch."""
    columns = padded_vocab_size(model.vocab_size, layout.tensor) / layout.tensor
    loss = clock.moved(layout.micro_tokens * columns * LOSS_BYTES)
    return clock.linear(layout.micro_tokens, model.hidden_size, columns) + loss


def l2e_seconds(model: ModelShape, layout: LayoutPlan, clock: Clock) -> float:
    """What the inhibited layers of one micro-batch add to the plain non-linearity."""
    activations = layout.micro_tokens * model.intermediate_size / layout.tensor
    return layout.inhibited_layers * clock.moved(activations * L2E_BYTES)


def step_seconds(
    model: ModelShape, layout: LayoutPlan, gpu: GPU, sustained: float | None = None
) -> dict[str, float]:
    """Seconds of one optimizer step by what they are spent on.

    arithmetic: blocks, output embedding and loss; a third more where the forward pass is run again.
    bubble: what a pipeline's ends stand idle, one micro-batch of a stage for each other stage.
    tensor, pipeline: bytes sent while nothing is computed.
    data: bytes of gradients and weights sent, as far as the backward pass does not hide them.
    l2e: kernels of the inhibited layers, and their one all-reduce.
    update: gradients added up every micro-batch (two read, one written), then read with the
        optimizer's states, which are written back.

    Ranks of one tensor group are neighbours, then data, then pipeline.
    """
    clock = Clock(gpu, layout.dtype, sustained)
    blocks = cost.stage_blocks(model.num_layers, layout.pipeline, 0)
    stage = blocks * block_seconds(model, layout, clock)
    if layout.checkpointing:
        stage *= 4 / 3
    head = head_seconds(model, layout, clock)
    # In a pipeline the output embedding's time is the last stage's alone.
    arithmetic = layout.accumulation * (stage + head / layout.pipeline)
    sent = sent_seconds(model, layout, gpu)
    exposed = max(sent["data"] - HIDDEN_BY * arithmetic, EXPOSED * sent["data"])
    parts = cost.peak_memory(model, layout)
    updated = 3 * layout.accumulation * parts["gradients"] + 2 * parts["optimizer"]
    return {
        "arithmetic": arithmetic,
        "bubble": (layout.pipeline - 1) * arithmetic / layout.accumulation,
        "tensor": sent["tensor"],
        "pipeline": sent["pipeline"],
        "data": exposed,
        "l2e": layout.accumulation * l2e_seconds(model, layout, clock) + sent["l2e"],
        "update": updated / gpu.memory_bandwidth,
    }


def sent_seconds(model: ModelShape, layout: LayoutPlan, gpu: GPU) -> dict[str, float]:
    """Seconds that a step's exchanges take by themselves, by purpose."""
    sent = cost.communication(model, layout)
    data = bandwidth(gpu, layout.tensor * layout.data, gpu.per_node // layout.tensor)
    reached = {
        "tensor": bandwidth(gpu, layout.tensor, layout.tensor),
        "pipeline": bandwidth(gpu, layout.ranks, 1),
        "data": data,
        "l2e": data,
    }
    return {purpose: sent[purpose] / speed for purpose, speed in reached.items()}


def bandwidth(gpu: GPU, spread: int, ports: int) -> float:
    """Bytes/s that each rank of a group sends in a collective.

    A group within a node has its links. One of `spread` neighbouring ranks over several nodes
    shares out what leaves a node among the network ports of its `ports` ranks there.
    """
    inside = spread <= gpu.per_node
    return LINK * (gpu.link if inside else min(gpu.link, gpu.network * max(1, ports)))
