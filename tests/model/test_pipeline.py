"""The list of layers for a pipeline engine is the whole model."""

import pytest
import torch

from model import ModelConfig
from model.gpt_neox import GPTNeoX
from model.pipeline import pipeline_layers, pipeline_loss

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("parallel_residual", [True, False])
def test_layers_one_after_the_other_are_the_model(parallel_residual):
    config = ModelConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=300,
        parallel_residual=parallel_residual,
    )
    whole = GPTNeoX(config, seed=9)
    specifications = pipeline_layers(config, seed=9)
    layers = [specification.build() for specification in specifications]
    parameters = {
        specification.prefix + name: parameter
        for specification, layer in zip(specifications, layers, strict=True)
        for name, parameter in layer.named_parameters()
    }
    assert list(parameters) == [name for name, _ in whole.named_parameters()]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameters[name], parameter), name

    sample = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    value = sample[:, :-1]
    for layer in layers:
        value = layer(value)
    loss = pipeline_loss(value, sample[:, 1:])
    whole_loss = whole(sample[:, :-1], sample[:, 1:])
    assert torch.equal(loss, whole_loss)

    loss.backward()
    whole_loss.backward()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad), name
