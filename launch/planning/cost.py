"""What a layout costs: parameters, FLOPs, memory and communication, from shapes alone.

Pure functions over plain numbers, so that `plan`, `--dry-run` and the MFU meter share one
arithmetic and a test can hold each of them against a counted or measured value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from model.config import padded_vocab_size

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32 = 4
# Of L2E: a layer's histogram (l2e.threshold.BINS of 1,280), and, of one layer at a time, the rows
# in which a GPU's programs sum and count what they see.
HISTOGRAM_BYTES = 1280 * 8
WORKSPACE_BYTES = 8 * 2**20
# What ZeRO-3 keeps whole at most (DeepSpeed's stage3_max_live_parameters and max_reuse_distance).
LIVE_PARAMETERS = 10**9


class ModelShape(Protocol):
    """The five numbers of a GPT-NeoX that decide its cost (`model.ModelConfig` has them)."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class LayoutPlan:
    """How one optimizer step is spread: sizes in ranks, batches in sequences a data-parallel rank.

    `accumulation` is the number of micro-batches a step, `logits_bytes` what the fp32 logits held
    at once take (model.loss.CHUNK_BYTES), `inhibited_layers` the number of L2E layers. `compiling`:
    blocks are compiled where the layout lets them be.
    """

    sequence_length: int = 2048
    micro_batch_size: int = 1
    accumulation: int = 1
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    zero_stage: int = 1
    dtype: str = "bf16"
    checkpointing: bool = False
    logits_bytes: int = 2**30
    inhibited_layers: int = 0
    compiling: bool = True

    @property
    def compiled(self) -> bool:
        """As `configs.checks.compile_obstacles` has it."""
        return self.compiling and self.tensor == self.pipeline == 1 and self.zero_stage <= 2

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch on one data-parallel rank."""
        return self.micro_batch_size * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Tokens of the global batch."""
        return self.micro_tokens * self.accumulation * self.data


# --- parameters -----------------------------------------------------------------------------


def block_matmul_parameters(model: ModelShape) -> int:
    """Weights of a block's four linears: QKV, attention output, h->4h, 4h->h."""
    return 4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size


def block_parameters(model: ModelShape, tensor: int = 1) -> int:
    """Parameters of one block on one tensor-parallel rank.

    Column-parallel biases are cut with their weights; row-parallel biases and the two LayerNorms
    are replicated.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    cut = block_matmul_parameters(model) + 3 * hidden + inner
    replicated = 2 * hidden + 2 * (2 * hidden)
    return cut // tensor + replicated


def embedding_parameters(model: ModelShape, tensor: int = 1) -> int:
    """Parameters of one embedding (input or output, they are untied) on one rank."""
    return padded_vocab_size(model.vocab_size, tensor) // tensor * model.hidden_size


def parameters(model: ModelShape) -> int:
    """All parameters of the unsharded model, the logical vocabulary's rows only."""
    blocks = model.num_layers * block_parameters(model)
    return blocks + 2 * model.vocab_size * model.hidden_size + 2 * model.hidden_size


def stage_blocks(num_layers: int, pipeline: int, stage: int) -> int:
    """Blocks held by one pipeline stage when they are dealt out as evenly as they go."""
    return num_layers // pipeline + (stage < num_layers % pipeline)


def stage_parameters(model: ModelShape, layout: LayoutPlan, stage: int = 0) -> int:
    """Parameters on one rank of a pipeline stage, before ZeRO partitions anything."""
    blocks = stage_blocks(model.num_layers, layout.pipeline, stage)
    count = blocks * block_parameters(model, layout.tensor)
    if stage == 0:
        count += embedding_parameters(model, layout.tensor)
    if stage == layout.pipeline - 1:
        count += embedding_parameters(model, layout.tensor) + 2 * model.hidden_size
    return count


# --- FLOPs ----------------------------------------------------------------------------------


def flops_per_token(model: ModelShape, sequence_length: int) -> int:
    """Training FLOPs of one token, forward and backward; recomputation is not counted.

    6 for each matmul parameter (the output embedding is one, the input embedding a look-up)
    plus 12 * layers * hidden * length for the attention scores, causal or not (the usual
    convention, so that MFU compares with other people's).
    """
    matmul = model.num_layers * block_matmul_parameters(model) + model.vocab_size * (
        model.hidden_size
    )
    return 6 * matmul + 12 * model.num_layers * model.hidden_size * sequence_length


# --- memory ---------------------------------------------------------------------------------


def block_activations(model: ModelShape, layout: LayoutPlan) -> int:
    """Bytes one block keeps of one micro-batch for its backward pass.

    Per token: the block's input and the two LayerNorm outputs; the fused QKV output, rotated
    query and key, and attention's result; the MLP before and after its activation. LayerNorms
    and attention add a few fp32 scalars a token. L2E saves nothing of its own.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    outside = 3 * hidden * BYTES[layout.dtype] + 2 * 2 * FP32
    inside = (3 + 2 + 1) * hidden + 2 * inner
    cut = inside * BYTES[layout.dtype] + model.num_attention_heads * FP32
    outside_ranks = layout.tensor if layout.sequence else 1
    return layout.micro_tokens * (outside // outside_ranks + cut // layout.tensor)


def activation_memory(model: ModelShape, layout: LayoutPlan, stage: int = 0) -> int:
    """Bytes of the activations alive at a stage's peak.

    The 1F1B schedule holds `pipeline - stage` micro-batches in flight; with checkpointing each
    keeps only the blocks' inputs, and one block at a time is whole again.
    """
    blocks = stage_blocks(model.num_layers, layout.pipeline, stage)
    in_flight = min(layout.accumulation, layout.pipeline - stage)
    whole = block_activations(model, layout)
    if not layout.checkpointing:
        return in_flight * blocks * whole
    kept = layout.micro_tokens * model.hidden_size * BYTES[layout.dtype]
    return in_flight * blocks * kept + whole


def logits_memory(model: ModelShape, layout: LayoutPlan) -> int:
    """Bytes of the cross-entropy: a chunk of logits in the model's dtype, in whose place their
    gradient comes, and the two gradients it computes at once, the hidden states' and, in fp32, the
    output embedding's (twice while chunks are added up).
    """
    columns = padded_vocab_size(model.vocab_size, layout.tensor) // layout.tensor
    element = BYTES[layout.dtype]
    chunk = min(layout.logits_bytes, layout.micro_tokens * columns * element)
    hidden_gradient = layout.micro_tokens * model.hidden_size * element
    weight_gradient = columns * model.hidden_size * FP32
    return chunk + hidden_gradient + 2 * weight_gradient


def l2e_memory(model: ModelShape, layout: LayoutPlan) -> int:
    """Bytes of L2E: per neuron and layer its mean in two words, variance and share above tau, what
    is derived from them (three numbers) and four sums; a histogram, and what one layer's kernels
    sum in rows.
    """
    neurons = model.intermediate_size // layout.tensor
    a_layer = 11 * neurons * FP32 + HISTOGRAM_BYTES
    return layout.inhibited_layers * a_layer + (WORKSPACE_BYTES if layout.inhibited_layers else 0)


def memory(model: ModelShape, layout: LayoutPlan, stage: int = 0) -> dict[str, int]:
    """Bytes by part on one rank of a pipeline stage.

    ZeRO partitions over data-parallel ranks: the optimizer's states from stage 1 on, gradients
    from 2, weights from 3. Adam keeps two fp32 moments, and an fp32 master copy wherever the
    weights are 16 bit or ZeRO partitions them; gradients accumulate in fp32, and 16-bit ones are
    freed as they are added.
    """
    count = stage_parameters(model, layout, stage)
    data, zero = layout.data, layout.zero_stage
    half = layout.dtype != "fp32"
    states = (3 if half or zero >= 1 else 2) * FP32
    return {
        "weights": count * BYTES[layout.dtype] // (data if zero >= 3 else 1),
        "gradients": count * FP32 // (data if zero >= 2 else 1),
        "optimizer": count * states // (data if zero >= 1 else 1),
        "activations": activation_memory(model, layout, stage),
        "logits": logits_memory(model, layout) if stage == layout.pipeline - 1 else 0,
        "l2e": l2e_memory(model, layout),
    }


def peak_memory(model: ModelShape, layout: LayoutPlan) -> dict[str, int]:
    """`memory` of the fullest pipeline stage."""
    stages = (memory(model, layout, stage) for stage in range(layout.pipeline))
    return max(stages, key=lambda parts: sum(parts.values()))


# --- communication --------------------------------------------------------------------------


def ring(size: int, ranks: int) -> int:
    """Bytes each rank sends when `size` bytes are gathered or reduce-scattered over a ring."""
    return size * (ranks - 1) // ranks


def communication(model: ModelShape, layout: LayoutPlan) -> dict[str, int]:
    """Bytes each rank sends in one optimizer step, by purpose (the fullest stage's).

    tensor: two all-reduces a block each way (attention and MLP; LayerNorms of their own feed them),
        one for each embedding, and three fp32 numbers a token for the cross-entropy; sequence
        parallelism moves as much as reduce-scatters and gathers.
    pipeline: what crosses a stage's boundary, activations forward and their gradients backward;
        with sequence parallelism each rank sends its part of the sequence.
    data: gradients all-reduced in fp32, once a step (ZeRO 0, 1) or every micro-batch (2), or
        reduce-scattered every micro-batch (3); weights gathered once a step, or at ZeRO-3, where
        they are more than DeepSpeed keeps whole, twice a micro-batch.
    l2e: one flat fp32 all-reduce of three sums a neuron, and five numbers a layer.
    """
    element = BYTES[layout.dtype]
    count = max(stage_parameters(model, layout, stage) for stage in range(layout.pipeline))
    hidden_bytes = layout.micro_tokens * model.hidden_size * element
    boundary = hidden_bytes // (layout.tensor if layout.sequence else 1)
    blocks = stage_blocks(model.num_layers, layout.pipeline, 0)
    exchanged = (4 * blocks + 2) * hidden_bytes + 3 * layout.micro_tokens * FP32
    gradients, weights = ring(count * FP32, layout.data), ring(count * element, layout.data)
    gathers = 1 if count <= LIVE_PARAMETERS else 2 * layout.accumulation
    statistics = (3 * model.intermediate_size // layout.tensor + 5) * FP32
    return {
        "tensor": layout.accumulation * 2 * ring(exchanged, layout.tensor),
        "pipeline": 2 * layout.accumulation * boundary if layout.pipeline > 1 else 0,
        "data": {
            0: 2 * gradients,
            1: 2 * gradients + weights,
            2: layout.accumulation * 2 * gradients + weights,
            3: layout.accumulation * gradients + gathers * weights,
        }[layout.zero_stage],
        "l2e": layout.inhibited_layers * 2 * ring(statistics, layout.data),
    }
