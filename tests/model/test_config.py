"""Presets have the published shapes and sizes; a wrong shape is refused with its reason."""

import json
from math import prod

import pytest
import torch
from pydantic import ValidationError

from model import PRESETS, ModelConfig
from model.config import padded_vocab_size
from model.gpt_neox import GPTNeoX
from model.parameters import parameter_shapes

PUBLISHED_PARAMETERS = {
    "14m": 14_067_712,
    "31m": 30_494_720,
    "70m": 70_426_624,
    "160m": 162_322_944,
    "410m": 405_334_016,
    "1b": 1_011_781_632,
    "1.4b": 1_414_647_808,
    "2.8b": 2_775_208_960,
    "6.9b": 6_857_302_016,
    "12b": 11_846_072_320,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts_are_the_published_ones(preset):
    shapes = parameter_shapes(ModelConfig(preset=preset))
    assert sum(map(prod, shapes.values())) == PUBLISHED_PARAMETERS[preset]


def test_parameters_without_embeddings():
    published = {"70m": 18_915_328, "410m": 302_311_424, "2.8b": 2_517_652_480}
    for preset, count in published.items():
        shapes = parameter_shapes(ModelConfig(preset=preset))
        inner = [prod(shape) for name, shape in shapes.items() if "embed" not in name]
        assert sum(inner) == count


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("preset", ["14m", "31m", "410m"])
def test_a_built_model_has_the_counted_parameters(preset):
    with torch.device("meta"):
        model = GPTNeoX(ModelConfig(preset=preset), seed=0)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[preset]


def test_presets_are_the_training_configurations(shared_data):
    published = json.loads((shared_data / "pythia_model_configs.json").read_text())["models"]
    for preset in PRESETS:
        ours, theirs = ModelConfig(preset=preset), published[f"pythia-{preset}"]["config"]
        assert ours.num_layers == theirs["num-layers"]
        assert ours.hidden_size == theirs["hidden-size"]
        assert ours.num_attention_heads == theirs["num-attention-heads"]
        assert ours.max_position_embeddings == theirs["max-position-embeddings"]
        assert ours.rotary_percent == theirs.get("rotary-pct", theirs.get("rotary_pct"))
        named = {"small_init": "pythia", None: "normal"}
        assert ours.initialization == named[theirs.get("init_method")]


def test_keys_given_beside_a_preset_win():
    config = ModelConfig(preset="70m", num_layers=2, vocab_size=4096)
    assert (config.num_layers, config.vocab_size, config.hidden_size) == (2, 4096, 512)
    assert config.intermediate_size == 2048


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "71m"}, "'14m', '31m', '70m'"),
        ({"preset": "70m", "num_attention_heads": 7}, "7 heads do not divide hidden_size 512"),
        ({"preset": "70m", "rotary_percent": 3 / 64}, "turns 3 of them"),
        ({"preset": "70m", "hidden_dims": 3}, "hidden_dims"),
        ({"num_layers": 2}, "hidden_size"),
        ({"preset": "70m", "num_layers": 0}, "num_layers"),
        ({"preset": "70m", "activation": "relu"}, "gelu_tanh"),
    ],
)
def test_wrong_shapes_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**given)


def test_padded_vocabulary_is_pythias():
    config = ModelConfig(preset="70m", vocab_size=50277)
    assert [padded_vocab_size(config.vocab_size, ranks) for ranks in (1, 2, 4)] == [
        50304,
        50432,
        50688,
    ]
