"""The gradient hook of sequence parallelism, on its own: megatron-core's exchange needs CUDA.

Each of two ranks sees half of the sequence; what is replicated must get the whole's gradient.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model.linears import LayerNorm, reduce_sequence_parallel_gradients
from tests.distributed.processes import run_on_processes

SEQUENCE, BATCH, HIDDEN = 8, 3, 16


def sample() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)


def loss_of(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (norm(x) ** 3).sum()


def half_of_the_sequence(marked: bool) -> dict:
    """Gradients of two micro-batches on this rank's half, and how many hooks there are."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    norm = LayerNorm(HIDDEN, 1e-5, sequence_parallel=marked)
    hooks = reduce_sequence_parallel_gradients(norm)
    part = sample().chunk(2)[dist.get_rank()]
    for micro_batch in part.split([1, BATCH - 1], dim=1):
        loss_of(norm, micro_batch).backward()
    parallel_state.destroy_model_parallel()
    return {"hooks": hooks, "weight": norm.weight.grad, "bias": norm.bias.grad}


def test_replicated_parameters_get_the_whole_sequences_gradient(tmp_path) -> None:
    norm = torch.nn.LayerNorm(HIDDEN, eps=1e-5).double()
    loss_of(norm, sample().double()).backward()
    for rank in run_on_processes(half_of_the_sequence, 2, tmp_path, True):
        assert rank["hooks"] == 2
        torch.testing.assert_close(rank["weight"].double(), norm.weight.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank["bias"].double(), norm.bias.grad, rtol=1e-5, atol=1e-5)


def test_without_the_mark_a_rank_has_its_half_alone(tmp_path) -> None:
    first, second = run_on_processes(half_of_the_sequence, 2, tmp_path, False)
    assert first["hooks"] == 0
    assert not torch.allclose(first["bias"], second["bias"])
