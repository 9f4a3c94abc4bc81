"""The analytic model of cost against counted parameters, counted FLOPs and published numbers."""

from dataclasses import dataclass, replace
from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from l2e import L2EConfig, L2ELayer
from launch.planning import cost
from launch.planning.cost import LayoutPlan
from model.block import Block
from model.config import PRESETS, ModelConfig
from model.loss import CHUNK_BYTES
from model.parameters import parameter_shapes


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int = 50304


PYTHIA = {
    "70m": Shape(6, 512, 8, 2048),
    "410m": Shape(24, 1024, 16, 4096),
    "2.8b": Shape(32, 2560, 32, 10240),
}
TINY = Shape(3, 32, 4, 96, 256)


def transformers_model(shape: Shape, **kwargs) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            num_hidden_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            attn_implementation="eager",
            **kwargs,
        )
    )


@pytest.mark.parametrize(
    ("preset", "published"),
    [("70m", 70_426_624), ("410m", 405_334_016), ("2.8b", 2_775_208_960)],
)
def test_parameters_are_pythias(preset, published):
    with torch.device("meta"):
        counted = sum(p.numel() for p in transformers_model(PYTHIA[preset]).parameters())
    assert cost.parameters(PYTHIA[preset]) == counted == published


@pytest.mark.parametrize("shape", [*({"preset": preset} for preset in PRESETS), vars(TINY)])
def test_parameters_are_those_of_all_tensors(shape):
    config = ModelConfig(**shape)
    assert cost.parameters(config) == sum(map(prod, parameter_shapes(config).values()))


@pytest.mark.parametrize(("preset", "giga"), [("70m", 0.343), ("410m", 2.73), ("2.8b", 17.9)])
def test_flops_per_token_of_pythia(preset, giga):
    assert cost.flops_per_token(PYTHIA[preset], 2048) / 1e9 == pytest.approx(giga, rel=5e-3)


def test_flops_equal_those_torch_counts_in_a_training_step():
    batch, length = 2, 16
    model = transformers_model(TINY)
    tokens = torch.randint(TINY.vocab_size, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    assert counter.get_total_flops() == cost.flops_per_token(TINY, length) * batch * length


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_stages_hold_the_whole_model_once(pipeline):
    layout = LayoutPlan(pipeline=pipeline)
    for shape in PYTHIA.values():
        held = sum(cost.stage_parameters(shape, layout, stage) for stage in range(pipeline))
        assert held == cost.parameters(shape)


def test_tensor_parallel_ranks_share_matrices_and_repeat_norms_and_row_biases():
    # By hand, hidden 32, inner 96, two ranks: matrices and column biases are cut in two.
    cut = (32 * 96 + 96) + 32 * 32 + (32 * 96 + 96) + 96 * 32
    repeated = 32 + 32 + 4 * 32
    assert cost.block_parameters(TINY, tensor=2) == cut // 2 + repeated


def test_mixed_precision_takes_eighteen_bytes_a_parameter():
    """A bf16 weight, and in fp32 the accumulated gradient, a master copy and two moments."""
    parts = cost.memory(PYTHIA["410m"], LayoutPlan(zero_stage=0))
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert held == (2 + 4 + 12) * cost.parameters(PYTHIA["410m"])


@pytest.mark.parametrize(
    ("stage", "partitioned"),
    [
        (0, set()),
        (1, {"optimizer"}),
        (2, {"optimizer", "gradients"}),
        (3, {"optimizer", "gradients", "weights"}),
    ],
)
def test_zero_partitions_over_data_parallel_ranks(stage, partitioned):
    one = cost.memory(PYTHIA["70m"], LayoutPlan(zero_stage=stage, inhibited_layers=2))
    four = cost.memory(PYTHIA["70m"], LayoutPlan(zero_stage=stage, data=4, inhibited_layers=2))
    assert {part for part in one if four[part] == one[part] // 4} == partitioned
    assert all(four[part] == one[part] for part in one.keys() - partitioned)


def test_checkpointing_keeps_block_inputs_only():
    whole = LayoutPlan(micro_batch_size=32)
    kept = replace(whole, checkpointing=True)
    shape = PYTHIA["70m"]
    inputs = shape.num_layers * 32 * 2048 * shape.hidden_size * 2
    assert cost.activation_memory(shape, kept) == inputs + cost.block_activations(shape, kept)
    assert cost.activation_memory(shape, kept) < cost.activation_memory(shape, whole) / 3


def test_l2e_keeps_what_is_counted():
    """State, sums and what a measured step adds up, of two layers; no tensor of activations."""
    config = L2EConfig(late_start_step=2)
    layer = L2ELayer(2048, config, name="0", inhibited_layers=2)
    stack = layer.state.stack
    held = [*stack.running, *stack.derived, stack.sums.flat, stack.measured.flat, stack.counts]
    kept = 2 * sum(tensor.nbytes for tensor in held)
    counted = cost.l2e_memory(PYTHIA["70m"], LayoutPlan(inhibited_layers=2)) - cost.WORKSPACE_BYTES
    assert abs(counted / kept - 1) < 0.01


def test_logits_are_never_held_whole_in_fp32():
    """70M at 32 x 2048: whole fp32 logits would be 13.2 GB."""
    layout = LayoutPlan(micro_batch_size=32)
    assert layout.micro_tokens * 50304 * 4 > 13e9
    assert layout.logits_bytes == CHUNK_BYTES["cuda"]
    assert cost.logits_memory(PYTHIA["70m"], layout) < 1.4e9


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0), ("bf16", 5e-3)])
@pytest.mark.parametrize(
    "l2e",
    [None, L2EConfig(layers="all", kernels="plain"), L2EConfig(layers="all")],
    ids=["without", "dense", "selected"],
)
def test_a_block_keeps_the_activations_it_is_said_to(one_process, dtype, tolerance, l2e):
    """Counted from what autograd saves. In bf16 a CPU keeps the LayerNorms' scalars in bf16."""
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=256)
    block = Block(1, config, l2e, seed=0).to(torch_dtype).train()
    constant = [*block.parameters(), *block.buffers()]
    if block.mlp.inhibitor is not None:
        constant.append(block.mlp.inhibitor.handle)
    constants = {tensor.untyped_storage().data_ptr() for tensor in constant}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in constants:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(32, 3, 64, dtype=torch_dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x)
    layout = LayoutPlan(sequence_length=32, micro_batch_size=3, dtype=dtype)
    expected = cost.block_activations(config, layout)
    assert sum(kept.values()) == pytest.approx(expected, rel=tolerance, abs=0)
    out.sum().backward()


def test_peak_is_the_fullest_stage():
    layout = LayoutPlan(pipeline=4, accumulation=8, micro_batch_size=8)
    shape = PYTHIA["410m"]
    totals = [sum(cost.memory(shape, layout, stage).values()) for stage in range(4)]
    assert sum(cost.peak_memory(shape, layout).values()) == max(totals)
    # The first stage holds four micro-batches in flight, the last one.
    assert cost.activation_memory(shape, layout, 0) == 4 * cost.activation_memory(shape, layout, 3)


def test_one_rank_sends_nothing():
    assert set(cost.communication(PYTHIA["70m"], LayoutPlan(inhibited_layers=2)).values()) == {0}


def test_l2e_sends_next_to_nothing():
    sent = cost.communication(PYTHIA["410m"], LayoutPlan(data=8, inhibited_layers=2))
    assert 0 < sent["l2e"] < 1e-4 * sent["data"]
