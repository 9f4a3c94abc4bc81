"""l2e.attach under DDP and FSDP2: two ranks compute what one computes on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import l2e
from tests.distributed.processes import run_on_processes
from tests.tiny_models import gpt2

STEPS = 5


def build():
    torch.manual_seed(0)
    return gpt2(n_positions=16).train()


def train(kind):
    """Final parameters, statistics and each step's L_MS."""
    model = build()
    config = l2e.L2EConfig(late_start_step=2, weight=0.5, layers="all")
    handle = l2e.attach(model, "transformer.h.*.mlp.act", config)
    run = model
    if kind == "ddp":
        run = DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
    size, rank = (1, 0) if kind == "alone" else (dist.get_world_size(), dist.get_rank())
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(50, (8, 16), generator=generator).chunk(size)[rank]
        optimizer.zero_grad()
        logits = run(tokens).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        (loss + handle.loss()).backward()
        optimizer.step()
        handle.step()
        losses.append(float(handle.controller.ms_loss()))
    parameters = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in model.named_parameters()
    }
    return {n: p.detach() for n, p in parameters.items()}, handle.state_dict(), losses


def train_both():
    return {kind: train(kind) for kind in ("ddp", "fsdp")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_on_processes(train_both, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_equal_one(kind, two_ranks):
    parameters, state, losses = train("alone")
    assert losses[-1] != 0
    for rank in two_ranks:
        found_parameters, found_state, found_losses = rank[kind]
        assert found_losses == pytest.approx(losses, rel=1e-5, abs=1e-8)
        for name, value in state.items():
            torch.testing.assert_close(found_state[name], value, rtol=1e-5, atol=1e-6)
        for name, value in parameters.items():
            torch.testing.assert_close(found_parameters[name], value, rtol=1e-5, atol=1e-6)
