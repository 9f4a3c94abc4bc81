"""Generation with remembered keys and values computes what one pass over the whole text does."""

import pytest
import torch

from model.attention import remembering
from model.config import ModelConfig
from model.gpt_neox import GPTNeoX


@pytest.mark.parametrize("parallel", [True, False])
def test_one_token_at_a_time_is_the_whole_text(one_process, parallel):
    config = ModelConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=24,
        parallel_residual=parallel,
        initialization="normal",
    )
    model = GPTNeoX(config, seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        tokens = torch.randint(128, (2, 24))
        whole = model(tokens)
        with remembering(model):
            parts = [model(tokens[:, :7])]
            parts += [model(tokens[:, i : i + 1]) for i in range(7, 24)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(tokens), whole)  # nothing is remembered afterwards
