"""Logits, loss and gradients equal those of Hugging Face's GPTNeoXForCausalLM."""

import pytest
import torch
import transformers

from model import ModelConfig
from model.gpt_neox import GPTNeoX
from tests.tiny_models import counterpart, their_names

pytestmark = pytest.mark.usefixtures("one_process")

SHAPE = {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 4, "vocab_size": 301}
VARIANTS = [
    {},
    {"parallel_residual": False},
    {"rotary_percent": 0.5},
    {"rotary_percent": 1.0, "parallel_residual": False},
    {"activation": "gelu_tanh"},
    {"activation": "gelu_tanh", "intermediate_size": 200, "rotary_base": 500.0},
    {"layer_norm_epsilon": 0.1},
]


def pair(**variant) -> tuple[GPTNeoX, transformers.GPTNeoXForCausalLM]:
    """Our model, its biases and norms disturbed, and Hugging Face's with the same weights."""
    config = ModelConfig(**(SHAPE | variant))
    ours = GPTNeoX(config, seed=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return ours, counterpart(config, ours.state_dict()).train()


def tokens_of(batch: int, sequence: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SHAPE["vocab_size"], (batch, sequence), generator=generator)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_loss_and_gradients(variant):
    ours, theirs = pair(**variant)
    sample = tokens_of(2, 33)
    tokens, labels = sample[:, :-1], sample[:, 1:]

    assert relative_error(ours(tokens), theirs(tokens).logits) < 1e-5

    loss = ours(tokens, labels)
    their_loss = theirs(sample, labels=sample).loss  # it shifts the labels itself
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)

    loss.backward()
    their_loss.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, gradient in their_names(our_gradients, SHAPE["vocab_size"]).items():
        assert relative_error(gradient, their_gradients[name]) < 1e-5, name


def test_gradients_through_the_logits_equal_those_through_the_chunked_loss():
    ours, _ = pair()
    sample = tokens_of(2, 17)
    tokens, labels = sample[:, :-1], sample[:, 1:]
    ours(tokens, labels).backward()
    chunked = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    torch.nn.functional.cross_entropy(ours(tokens).flatten(0, 1), labels.flatten()).backward()
    for gradient, parameter in zip(chunked, ours.parameters(), strict=True):
        assert relative_error(gradient, parameter.grad) < 1e-5


def test_activation_checkpointing_changes_no_bit():
    config = ModelConfig(**SHAPE)
    sample = tokens_of(2, 17)
    gradients = []
    for activation_checkpointing in (False, True):
        model = GPTNeoX(config, seed=5, activation_checkpointing=activation_checkpointing)
        calls = []
        model.gpt_neox.layers[1].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(sample[:, :-1], sample[:, 1:]).backward()
        assert len(calls) == (2 if activation_checkpointing else 1)  # the second in the backward
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_bfloat16_stays_within_its_own_rounding():
    ours, theirs = pair()
    sample = tokens_of(2, 33)
    reference = theirs(sample, labels=sample).loss.item()
    loss = ours.bfloat16()(sample[:, :-1], sample[:, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference, rel=2**-8)


def test_a_sequence_too_long_names_the_key_to_change():
    model = GPTNeoX(ModelConfig(**SHAPE, max_position_embeddings=8), seed=5)
    with pytest.raises(ValueError, match="max_position_embeddings is 8"):
        model(tokens_of(1, 9))
