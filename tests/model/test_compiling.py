"""Compiled blocks compute what plain ones do, without a graph break."""

import pytest
import torch

from l2e import Controller, L2EConfig, Sharding
from model import ModelConfig
from model.compiling import compile_blocks
from model.gpt_neox import GPTNeoX

pytestmark = pytest.mark.usefixtures("one_process")

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=300)


def train(compiled: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Losses of four steps, the third measured, with an evaluation after; and a gradient."""
    l2e = L2EConfig(method="regularize", layers=[1], late_start_step=1)
    model = GPTNeoX(CONFIG, l2e, seed=1)
    if compiled:
        assert compile_blocks(model) == CONFIG.num_layers
    controller = Controller([model.gpt_neox.layers[1].mlp.inhibitor], l2e, Sharding())
    sample = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(4):
        controller.measure = step == 2
        loss = model(sample[:, :-1], sample[:, 1:])
        loss.backward()
        controller.step()
        losses.append(loss.detach())
    with torch.no_grad():
        losses.append(model.eval()(sample[:, :-1], sample[:, 1:]))
    return losses, model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.grad


def test_compiled_training_is_plain_training(monkeypatch):
    # Fewer graphs than the two blocks' training, measured steps and evaluation take.
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 4)
    losses, gradient = train(compiled=True)
    plain_losses, plain_gradient = train(compiled=False)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=0)
    assert (gradient - plain_gradient).norm() < 1e-5 * plain_gradient.norm()
