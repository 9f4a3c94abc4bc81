"""Initial weights: Pythia's standard deviations, each parameter from its own seed."""

import math

import pytest
import torch

from model import ModelConfig
from model.gpt_neox import GPTNeoX
from model.init import initial_std, initializer

# Of Pythia's training, to five decimals: (other matrices, the residual stream's writers).
PUBLISHED_STDS = {"70m": (0.02795, 0.01473), "410m": (0.01976, 0.00260), "2.8b": (0.0125, 0.00124)}


@pytest.mark.parametrize("preset", PUBLISHED_STDS)
def test_formula_gives_pythias_stds(preset):
    config = ModelConfig(preset=preset)
    small, wang = PUBLISHED_STDS[preset]
    layer = "gpt_neox.layers.0"
    for name in ("attention.query_key_value", "mlp.dense_h_to_4h"):
        assert initial_std(f"{layer}.{name}.weight", config) == pytest.approx(small, abs=5e-6)
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        assert initial_std(name, config) == pytest.approx(small, abs=5e-6)
    for name in ("attention.dense", "mlp.dense_4h_to_h"):
        assert initial_std(f"{layer}.{name}.weight", config) == pytest.approx(wang, abs=5e-6)


def test_the_largest_models_use_neox_default():
    config = ModelConfig(preset="6.9b")
    assert initial_std("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", config) == 0.02
    assert initial_std("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", config) == 0.02 / 8


@pytest.mark.usefixtures("one_process")
def test_measured_stds_of_a_built_model():
    config = ModelConfig(preset="14m", num_layers=2)
    model = GPTNeoX(config, seed=1234)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes_residual = "attention.dense" in name or "4h_to_h" in name
            std = 2 / (2 * math.sqrt(128)) if writes_residual else math.sqrt(2 / (5 * 128))
            # The sample std of n normal values is within 4 / sqrt(2 n) of std (4 sigma).
            allowed = 4 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, rel=allowed), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name
        else:
            is_norm_weight = "norm" in name and name.endswith("weight")
            assert torch.equal(parameter, torch.full_like(parameter, float(is_norm_weight))), name


def test_each_parameter_and_seed_draws_its_own_numbers():
    config = ModelConfig(preset="14m")
    drawn = [
        initializer(name, config, seed)(torch.empty(128, 128)).flatten()
        for name in ("gpt_neox.layers.0.mlp.dense.weight", "gpt_neox.layers.1.mlp.dense.weight")
        for seed in (0, 1)
    ]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(4)
    assert correlations.abs().max() < 4 / 128  # 4 sigma of independent draws


def test_rows_past_the_vocabulary_are_zero_and_change_no_other_row():
    config = ModelConfig(preset="14m", vocab_size=300)
    fill = initializer("embed_out.weight", config, seed=0)
    narrow, wide = fill(torch.empty(384, 128)), fill(torch.empty(512, 128))
    assert torch.equal(narrow[:300], wide[:300])
    assert not narrow[300:].any()
    assert not wide[300:].any()
