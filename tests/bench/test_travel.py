"""Ranges over settings, of runs whose effects are known."""

import math

import pytest

from bench.travel import lines, travel

SETTINGS = {"128_0.003": 0.2, "128_0.001": 0.3, "256_0.003": 0.1}  # std of none


def arms(**effects):
    """Arms whose ln(std / std of none) is given by setting, the same in every seed but a shift."""
    found = {f"none_{s}": {"21": {"std": std, "kurtosis": 6.0}} for s, std in SETTINGS.items()}
    for knob, by_setting in effects.items():
        for (setting, std), effect in zip(SETTINGS.items(), by_setting, strict=True):
            found[f"{knob}_{setting}"] = {
                str(seed): {"std": std * math.exp(effect + seed), "kurtosis": 3.0}
                for seed in (1, 2, 3)
            }
    return found


def test_the_range_is_over_settings_and_paired_over_seeds():
    told = travel(arms(ratio=(-1.0, -1.1, -0.9), weight=(-1.0, -0.2, -2.0)), "ratio", "weight")
    assert list(told["std"]["ranges"]["ratio"].values()) == pytest.approx([0.2] * 3)
    assert list(told["std"]["ranges"]["weight"].values()) == pytest.approx([1.8] * 3)
    assert told["std"]["difference"].mean == pytest.approx(-1.6)
    assert told["kurtosis"]["effects"]["ratio"]["128_0.001"]["2"] == 3.0
    assert "-1.6000 [-1.6000, -1.6000], 3 seeds" in lines(told, "ratio", "weight")[9]


def test_a_setting_without_its_reference_is_told():
    runs = arms(ratio=(0.0, 0.0, 0.0), weight=(0.0, 0.0, 0.0))
    runs["none_256_0.003"] = {}
    with pytest.raises(
        ValueError, match=r"arm ratio_256_0\.003: no finished run of none_256_0\.003"
    ):
        travel(runs, "ratio", "weight")
