"""DDP with accumulation, uneven inputs and layers that one rank alone calls; FSDP2."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import l2e
from tests.distributed.processes import run_on_processes
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_moments,
    batches,
    loss_of,
    network,
    train,
)


def accumulated(kind):
    """Two micro-batches a step on each rank; attached before there is a process group's wrapper."""
    model = network()
    handle = l2e.attach(model, "1", CONFIG)
    if kind == "fsdp":
        run = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        run = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(run.parameters(), lr=0.05)
    for x in batches(6, rows=64):
        parts = x.chunk(4)[2 * dist.get_rank() :][:2]
        optimizer.zero_grad()
        for number, part in enumerate(parts):
            if kind == "fsdp":
                run.set_requires_gradient_sync(number == 1)
            else:
                run.require_backward_grad_sync = number == 1
            ((loss_of(run, part) + handle.loss()) / 2).backward()
        optimizer.step()
        handle.step()
    parameters = [p.full_tensor() if kind == "fsdp" else p for p in model.parameters()]
    return [p.detach() for p in parameters], handle.state_dict(), handle.metrics()


class Branches(nn.Module):
    """The second branch is called where it is asked for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x, second):
        return self.a(x) + self.b(x) if second else self.a(x)


def branches():
    """The second branch is called on rank 1 alone, and not at first; returns collectives too."""
    model = Branches().train()
    handle = l2e.attach(model, "?", CONFIG)
    counted = []
    reduce = dist.all_reduce

    def counting(*args, **kwargs):
        counted[-1] += 1
        return reduce(*args, **kwargs)

    dist.all_reduce = counting
    for step, x in enumerate(batches(8)):
        counted.append(0)
        second = dist.get_rank() == 1 and step >= 2
        mine = 10_000 + x.chunk(2)[dist.get_rank()]
        (model(mine, second).mean() + handle.loss()).backward()
        handle.step()
    dist.all_reduce = reduce
    return handle.state_dict(), counted


def uneven():
    """Rank 1 has two batches more than rank 0."""
    model = network()
    handle = l2e.attach(model, "1", CONFIG)
    run = DistributedDataParallel(model)
    with Join([run, handle]):
        train(run, handle, batches(4 + 2 * dist.get_rank(), seed=dist.get_rank()))
    return handle.state_dict()


class Padded(nn.Module):
    """Takes a mask, and runs its layer under activation checkpointing where asked."""

    def __init__(self, checkpoint):
        super().__init__()
        self.net, self.checkpoint = network(), checkpoint

    def forward(self, x, mask=None):
        if not self.checkpoint:
            return self.net(x)
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


def padded_batches():
    """[samples, positions, 4] and which count; in some steps none of the second half does."""
    for step, x in enumerate(batches(6, rows=64)):
        mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(step)) > 0.4
        mask[4:] &= step % 3 != 1
        yield x.view(8, 8, 4), mask


def masked(checkpoint):
    """Each rank has its own padding, and rank 1 now and then nothing else."""
    model = Padded(checkpoint).train()
    handle = l2e.attach(model, "net.1", CONFIG, mask="mask")
    run = DistributedDataParallel(model)
    for x, mask in padded_batches():
        own, counts = (part.chunk(2)[dist.get_rank()] for part in (x, mask))
        (run(own, counts).mean() + handle.loss()).backward()
        handle.step()
    return handle.state_dict()


def left_behind():
    """What a handle says inside a wrapper's own join()."""
    model = network()
    handle = l2e.attach(model, "1", CONFIG)
    run = DistributedDataParallel(model)
    try:
        with run.join():
            train(run, handle, batches(2 + dist.get_rank()))
    except ValueError as error:
        return str(error)
    return ""


def grouped_late(folder):
    """The process group is made after attach, as by a launcher's first use of it."""
    rank, count = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    model = network()
    handle = l2e.attach(model, "1", CONFIG)
    store = f"file://{folder / 'late'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    train(model, handle, [x.chunk(2)[rank] for x in batches(6, rows=64)])
    return handle.state_dict()


def stages():
    """Each rank has modules of its own; returns what it is told, and its samples by itself."""
    model = nn.ModuleDict({f"stage{dist.get_rank()}": network()}).train()
    [stage] = model.values()
    together = l2e.attach(model, "*.1", CONFIG)
    stage(batches(1)[0])
    with pytest.raises(ValueError, match="different modules") as refused:
        together.step()
    together.detach()
    alone = l2e.attach(model, "*.1", CONFIG, sharding=l2e.Sharding())
    stage(batches(1)[0])
    alone.step()
    return str(refused.value), alone.state_dict()


def everything(folder):
    return {
        "stages": stages(),
        "masked": masked(False),
        "recomputed": masked(True),
        "left behind": left_behind(),
        "ddp": accumulated("ddp"),
        "fsdp": accumulated("fsdp"),
        "branches": branches(),
        "uneven": uneven(),
        "late": grouped_late(folder),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loops")
    return run_on_processes(everything, 2, folder, folder)


def assert_same_state(state, name, reference):
    assert_same_moments(state, name, reference)
    assert float(state[f"{name}.tau"]) == pytest.approx(reference.tau, rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_of_two_micro_batches_are_the_reference(ranks, kind):
    twin = Twin(network(), ["1"])
    share = twin.train([[x] for x in batches(6, rows=64)], lr=0.05)["1"]
    for parameters, state, metrics in (rank[kind] for rank in ranks):
        assert_same_state(state, "1", twin.references["1"])
        assert metrics["1"]["selected_fraction"] == pytest.approx(share, rel=1e-5)
        for mine, theirs in zip(parameters, twin.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=2e-4, atol=2e-5)


def test_a_layer_that_one_rank_calls_is_everyones(ranks):
    (state, counted), (other, _) = (rank["branches"] for rank in ranks)
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert counted == [1] * 8
    torch.manual_seed(0)
    twin = Twin(Branches().train(), ["a", "b"])
    for step, x in enumerate(batches(8)):
        for rank, part in enumerate((10_000 + x).chunk(2)):
            twin.model(part, rank == 1 and step >= 2)
        twin.pull()
        twin.step()
    for name, reference in twin.references.items():
        assert float(state[f"{name}.samples"]) == reference.m
        # The reference's own input is what a float32 linear layer gave: 1e-3 of a step of 10,000.
        np.testing.assert_allclose(state[f"{name}.var"], reference.var, rtol=1e-3)
        assert float(state[f"{name}.tau"]) == pytest.approx(reference.tau, rel=0.05)


def test_ranks_out_of_inputs_step_along(ranks):
    state, other = (rank["uneven"] for rank in ranks)
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert int(state["step"]) == 6
    twin = Twin(network(), ["1"])
    data = [batches(4 + 2 * rank, seed=rank) for rank in range(2)]
    for step in range(6):
        for own in data:
            if step < len(own):
                twin.model(own[step])
        twin.pull()
        twin.step()
    assert_same_state(state, "1", twin.references["1"])


@pytest.mark.parametrize("kind", ["masked", "recomputed"])
def test_masks_differ_from_rank_to_rank(ranks, kind):
    state, other = (rank[kind] for rank in ranks)
    assert all(torch.equal(state[name], other[name]) for name in state)
    twin = Twin(network(), ["1"])
    for x, mask in padded_batches():
        twin.model(x)
        twin.pull(mask)
        twin.step()
    assert_same_state(state, "net.1", twin.references["1"])


def test_a_wrappers_own_join_is_refused(ranks):
    for rank in ranks:
        assert "with Join([ddp_model, handle]):" in rank["left behind"]


def test_ranks_with_different_modules_are_told(ranks):
    for rank, told in enumerate(ranks):
        message, state = told["stages"]
        assert f"this one stage{rank}.1 with" in message
        assert "sharding=l2e.Sharding(data_group=group)" in message
        assert state[f"stage{rank}.1.samples"] == 32


def test_a_group_that_is_made_after_attach_is_found(ranks):
    twin = Twin(network(), ["1"])
    twin.follow(batches(6, rows=64))
    for rank in ranks:
        assert_same_state(rank["late"], "1", twin.references["1"])
