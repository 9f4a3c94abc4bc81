"""accelerate: accumulate(), and a state that travels with save_state."""

import pytest
import torch

import l2e
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_parameters,
    assert_same_statistics,
    batches,
    network,
)

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("prepared_first", [False, True])
def test_accumulate_and_save_state(tmp_path, prepared_first):
    twin = Twin(network(), ["1"])
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if prepared_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    handle = l2e.attach(model, "1", CONFIG, optimizer=optimizer)
    if not prepared_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(handle)
    data = batches(12)
    for x in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean() + handle.loss())
            optimizer.step()
            optimizer.zero_grad()
    shares = twin.train(zip(data[::2], data[1::2], strict=True))
    assert handle.controller.phase.step == 6
    assert_same_statistics(handle, twin, shares)
    assert_same_parameters(model, twin.model)
    saved = handle.state_dict()
    accelerator.save_state(str(tmp_path / "state"))
    model(100 * data[0])
    optimizer.step()
    accelerator.load_state(str(tmp_path / "state"))
    restored = handle.state_dict()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)
