"""Two and four tensor-parallel ranks compute what one rank computes."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model import ModelConfig
from model.gpt_neox import GPTNeoX
from tests.distributed.processes import run_on_processes

# 300 rows pad to 384, 512 and 512 on 1, 2 and 4 ranks: on four, the last rank has padding alone.
SHAPE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300}


def run_both_residuals() -> dict[str, dict]:
    """Parallel and sequential residual: what `run_model` returns for each."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    results = {"parallel": run_model(True), "sequential": run_model(False)}
    parallel_state.destroy_model_parallel()
    return results


def run_model(parallel_residual: bool) -> dict:
    """Initial weights, logits, loss and gradients, whole, as this rank sees them."""
    config = ModelConfig(**SHAPE, parallel_residual=parallel_residual)
    model = GPTNeoX(config, seed=3)
    weights = {name: whole(p, p.detach(), config) for name, p in model.named_parameters()}
    with torch.no_grad():  # biases away from zero, so that adding one twice would show
        for name, parameter in model.named_parameters():
            if name.endswith("dense.bias") or name.endswith("4h_to_h.bias"):
                parameter.fill_(0.1)
    sample = torch.randint(300, (2, 13), generator=torch.Generator().manual_seed(0))
    tokens, labels = sample[:, :-1], sample[:, 1:]
    logits = model(tokens)
    logits.square().mean().backward()
    through_logits = gradients(model, config)
    model.zero_grad()
    loss = model(tokens, labels)
    loss.backward()
    return {
        "weights": weights,
        "logits": logits.detach(),
        "loss": loss.detach(),
        "gradients through logits": through_logits,
        "gradients through loss": gradients(model, config),
    }


def gradients(model: GPTNeoX, config: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: whole(p, p.grad, config) for name, p in model.named_parameters()}


def whole(parameter: torch.nn.Parameter, shard: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The shards of all ranks joined along the parameter's partition dimension, unpadded."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return shard.clone()
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard.contiguous())
    joined = torch.cat(shards, dim=parameter.partition_dim)
    return joined[: config.vocab_size] if joined.shape[0] in (384, 512) else joined


def assert_close(ours, reference, what: str) -> None:
    error = (ours - reference).norm() / reference.norm()
    assert error < 1e-5, f"{what}: relative error {error:.1e}"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict[str, dict]:
    return run_on_processes(run_both_residuals, 1, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one(ranks, one_rank, tmp_path):
    for results in run_on_processes(run_both_residuals, ranks, tmp_path):
        for residual, reference in one_rank.items():
            assert_same(results[residual], reference)


def assert_same(result: dict, reference: dict) -> None:
    for name, weight in reference["weights"].items():
        assert torch.equal(result["weights"][name], weight), name
    assert_close(result["logits"], reference["logits"], "logits")
    assert_close(result["loss"], reference["loss"], "loss")
    for path in ("gradients through logits", "gradients through loss"):
        for name, gradient in reference[path].items():
            assert_close(result[path][name], gradient, f"{path}, {name}")


def triton_loss_of_shards() -> dict[str, torch.Tensor]:
    """The cross-entropy through Triton's softmax, interpreted, and its gradients of this rank."""
    from model import loss, triton_loss

    loss.fused_softmax = lambda *_: triton_loss.softmax
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels = loss_inputs()
    hidden.requires_grad_()
    shard = weight.chunk(ranks)[rank].clone().requires_grad_()
    value = loss.cross_entropy(hidden, shard, labels, VOCABULARY, dist.group.WORLD)
    value.backward()
    dist.all_reduce(hidden.grad)  # each rank has its share
    return {"loss": value.detach(), "hidden": hidden.grad, "weight": shard.grad}


VOCABULARY = 100  # of 128 rows: half of the last of two shards' is padding


def loss_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (20, 128))
    return hidden, weight, torch.randint(VOCABULARY, (20,), generator=generator)


def test_tritons_softmax_over_shards_of_the_vocabulary_equals_float64(tmp_path):
    pytest.importorskip("triton")
    hidden, weight, labels = loss_inputs()
    hidden, weight = (t.double().requires_grad_() for t in (hidden, weight))
    exact = torch.nn.functional.cross_entropy((hidden @ weight.T)[:, :VOCABULARY], labels)
    exact.backward()
    found = run_on_processes(triton_loss_of_shards, 2, tmp_path)
    for rank, result in enumerate(found):
        wanted = {"loss": exact, "hidden": hidden.grad, "weight": weight.grad.chunk(2)[rank]}
        for name, value in wanted.items():
            error = (result[name] - value).norm() / value.norm()
            assert error < 1e-6, (rank, name, error)
