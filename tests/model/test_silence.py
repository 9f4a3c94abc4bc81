"""The control of a switched-off MLP is off wherever the model is used."""

import pytest
import torch

from l2e import L2EConfig
from model import ModelConfig
from model.gpt_neox import GPTNeoX

SHAPE = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.usefixtures("one_process")
def test_a_silenced_mlp_is_off_in_evaluation_as_in_training():
    config = L2EConfig(method="silence", layers=[1])
    model = GPTNeoX(ModelConfig(**SHAPE), config, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.train()(tokens), model.eval()(tokens))
    mlp = model.gpt_neox.layers[1].mlp
    assert not mlp.dense_4h_to_h.weight.any()
    assert mlp.dense_4h_to_h.bias.any()
    assert model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight.any()
