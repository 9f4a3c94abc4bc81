"""Mixed precision with a gradient scaler, which skips steps whose gradients overflow."""

import pytest
import torch

import l2e
from tests.l2e.loops.twin import CONFIG, Twin, assert_same_statistics, batches, network


@pytest.mark.filterwarnings("error:l2e")
@pytest.mark.parametrize(
    ("overflows", "fused"), [((), False), ((2, 5), False), ((1, 2, 3, 6), True)]
)
def test_steps_that_the_scaler_skips_are_no_steps(overflows, fused):
    """Their samples wait for the next real step; a fused optimizer skips inside its step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG, optimizer=optimizer)
    for step, x in enumerate(batches(9)):
        optimizer.zero_grad()
        twin.model.load_state_dict(model.state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            out, twin_out = model(x), twin.model(x)
        loss, pull = out.float().square().mean() + handle.loss(), twin.pull()
        scaler.scale(loss).backward()
        twin.model.zero_grad()
        (twin_out.float().square().mean() + pull).backward()
        for mine, theirs in zip(model.parameters(), twin.model.parameters(), strict=True):
            wanted = theirs.grad * scaler.get_scale()
            assert (mine.grad - wanted).norm() <= 0.02 * wanted.norm()
        if step in overflows:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step not in overflows:
            assert_same_statistics(handle, twin, twin.step())
    assert handle.controller.phase.step == 9 - len(overflows)
    assert twin.references["1"].updates > 0
