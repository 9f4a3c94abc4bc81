"""Two losses and two graphs in a step: a discriminator that is also the generator's critic."""

import pytest
import torch
from torch import nn

import l2e
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_parameters,
    assert_same_statistics,
    batches,
    network,
)


@pytest.mark.parametrize("paused", [False, True])
def test_each_graph_has_its_own_terms(paused):
    critic = network()
    torch.manual_seed(1)
    generator = nn.Linear(4, 4)
    twin = Twin(critic, ["1"])
    twin_generator = nn.Linear(4, 4)
    twin_generator.load_state_dict(generator.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (critic, twin.model)]
    handle = l2e.attach(critic, "1", CONFIG, optimizer=optimizers[0])
    for real in batches(8):
        noise = real.flip(0)
        for model, generate, optimizer, term in (
            (critic, generator, optimizers[0], handle.loss),
            (twin.model, twin_generator, optimizers[1], twin.pull),
        ):
            optimizer.zero_grad()
            scores = model(real).mean() - model(generate(noise).detach()).mean()
            (scores + term()).backward()
            optimizer.step()
        shares = twin.step()
        assert_same_statistics(handle, twin, shares)
        if paused:
            with handle.paused():
                critic(generator(noise)).mean().backward()
            twin.model(twin_generator(noise)).mean().backward()
            twin.forget()
            twin_generator.zero_grad()
            generator.zero_grad()
    assert_same_parameters(critic, twin.model)
    assert twin.references["1"].updates > 0


def test_a_graph_that_was_used_is_left_out_and_told_of():
    critic = network()
    handle = l2e.attach(critic, "1", CONFIG)
    for x in batches(4):
        (critic(x).mean() + handle.loss()).backward()
        handle.step()
    x = batches(1)[0]
    critic(x).mean().backward()  # the generator's turn, not paused
    out = critic(2 * x)
    with pytest.warns(UserWarning, match=r"was used by another backward pass.*handle\.paused"):
        loss = handle.loss()
    (out.mean() + loss).backward()
    reference = network()
    alone = l2e.attach(reference, "1", CONFIG)
    alone.load_state_dict(handle.state_dict())
    reference.load_state_dict(critic.state_dict())
    reference(2 * x)
    torch.testing.assert_close(loss, alone.loss())
