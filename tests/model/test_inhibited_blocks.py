"""Which blocks get an L2E layer, and that it changes nothing where it must not."""

import pytest
import torch

from l2e import Controller, L2EConfig, L2ELayer, Sharding
from model import ModelConfig
from model.gpt_neox import GPTNeoX

pytestmark = pytest.mark.usefixtures("one_process")

CONFIG = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=300)


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def inhibited(**l2e) -> tuple[GPTNeoX, dict[str, L2ELayer]]:
    model = GPTNeoX(CONFIG, L2EConfig(**l2e), seed=1)
    modules = model.named_modules()
    return model, {name: module for name, module in modules if isinstance(module, L2ELayer)}


@pytest.mark.parametrize(
    ("layers", "numbers"), [("mid2", [1, 2]), ("top_bottom", [0, 3]), ([3], [3])], ids=str
)
def test_the_selected_blocks_alone_are_inhibited(layers, numbers):
    _, found = inhibited(method="regularize", layers=layers)
    assert list(found) == [f"gpt_neox.layers.{number}.mlp.inhibitor" for number in numbers]
    assert [layer.state.name for layer in found.values()] == [str(number) for number in numbers]


def test_the_state_dict_and_evaluation_are_the_plain_models():
    model, _ = inhibited(method="regularize")
    plain = GPTNeoX(CONFIG, seed=1)
    assert list(model.state_dict()) == list(plain.state_dict())
    tokens, _ = sample()
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))


def test_method_none_trains_as_the_plain_model():
    model, _ = inhibited(method="none")
    plain = GPTNeoX(CONFIG, seed=1)
    for network in (model, plain):
        network(*sample()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("parallel_residual", [True, False])
def test_the_ratio_of_mlp_to_residual_is_measured(parallel_residual):
    config = CONFIG.model_copy(update={"parallel_residual": parallel_residual})
    l2e = L2EConfig(method="regularize", layers=[2])
    model = GPTNeoX(config, l2e, seed=1)
    block = model.gpt_neox.layers[2]
    controller = Controller([block.mlp.inhibitor], l2e, Sharding())
    model(*sample()).backward()
    controller.step()  # statistics exist from the second step on
    controller.measure = True
    seen = {}
    block.mlp.register_forward_hook(lambda *call: seen.update(mlp=call[2]))
    norm = block.post_attention_layernorm
    norm.register_forward_hook(lambda *call: seen.update(residual=call[1][0]))
    model(*sample()).backward()
    controller.step()
    expected = (seen["mlp"].square().mean() / seen["residual"].square().mean()).sqrt().item()
    assert controller.metrics()["2"]["mlp_to_residual"] == pytest.approx(expected, rel=1e-5)
