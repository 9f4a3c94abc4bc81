"""The configuration explains itself and refuses what is wrong, all at once."""

import dataclasses

import pytest

from l2e import L2EConfig, select_layers


def test_every_key_has_help():
    for field in dataclasses.fields(L2EConfig):
        assert field.metadata["help"], field.name


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError) as caught:
        L2EConfig(method="regularise", inhibit_fraction=1.5, topk=2.5, scale_invariant=1)
    message = str(caught.value)
    assert "method = 'regularise': expected one of 'none', 'regularize'" in message
    assert "inhibit_fraction = 1.5: must be less than 1" in message
    assert "topk = 2.5: expected a whole number" in message
    assert "scale_invariant = 1: expected true or false" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale_invariant": True, "method": "deactivate"}, "only L_MS has this form"),
        ({"memel_code_compat": True}, "use method = 'deactivate' and selection = 'topk'"),
        ({"threshold_rate": 0.01}, "threshold_rate_floor = 0.02: greater than"),
        ({"layers": "middle"}, "layers = 'middle': expected one of 'mid2'"),
        ({"weight": True}, "weight = True: expected a number, or null"),
        ({"gradient_ratio": 0}, "gradient_ratio = 0: must be greater than 0"),
        ({"gradient_ratio": -0.1}, "gradient_ratio = -0.1: must be greater than 0"),
        ({"gradient_ratio": float("inf")}, "gradient_ratio = inf: expected a number"),
        ({"gradient_ratio": "0.1"}, "gradient_ratio = '0.1': expected a number"),
        ({"gradient_ratio": 0.1, "weight": 0.0003}, "and weight = 0.0003 does too; give one"),
        ({"gradient_ratio": 0.1, "weight": 0}, "and weight = 0 does too; give one of the two"),
        ({"gradient_ratio": 0.1, "method": "none"}, "which method = 'none' has not"),
        ({"gradient_ratio": 0.1, "method": "silence"}, "which method = 'silence' has not"),
        ({"gradient_ratio": 0.1, "method": "deactivate"}, "use method = 'regularize', or leave"),
        ({"weight": float("nan")}, "expected a number"),
    ],
)
def test_contradictions_name_key_value_and_fix(settings, words):
    with pytest.raises(ValueError, match=words):
        L2EConfig(**settings)


def test_the_weight_is_the_default_unless_a_ratio_sets_it():
    assert L2EConfig().weight == L2EConfig(weight=None).weight == 0.0003
    assert L2EConfig(gradient_ratio=0.1).weight is None
    by_ratio = L2EConfig(gradient_ratio=0.1, selection="topk")
    assert L2EConfig(**dataclasses.asdict(by_ratio)) == by_ratio


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("mid2", 6, (2, 3)),
        ("mid2", 7, (2, 3)),
        ("mid2", 1, (0,)),
        ("mid_third", 24, tuple(range(8, 16))),
        ("mid_third", 6, (2, 3)),
        ("top_bottom", 6, (0, 5)),
        ("all", 3, (0, 1, 2)),
        ([4, 1], 6, (1, 4)),
    ],
)
def test_layer_choice(layers, num_layers, expected):
    assert select_layers(layers, num_layers) == expected


@pytest.mark.parametrize("layers", [[], [6], [-1], [1, 1]])
def test_wrong_block_numbers_are_refused(layers):
    with pytest.raises(ValueError, match="distinct block numbers from 0 to 5"):
        select_layers(layers, 6)
