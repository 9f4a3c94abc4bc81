"""False Killing Rate against its definition, and neurons whose rate is known."""

import numpy as np
import pytest

from l2e.analysis.fkr import SHARES, analyze_fkr, killed
from tests.l2e.analysis.test_scale import Collected, feature_set, slow


def slow_fkr(z, labels, features, share):
    phi, _, _, best = slow(z, labels, features)
    entries = sorted(
        ((phi[i, j], labels[i] != best[j]) for i in range(len(z)) for j in range(z.shape[1])),
        reverse=True,
    )
    tau = entries[int(np.ceil(share * len(entries))) - 1][0]
    reached = [false for value, false in entries if value >= tau]
    return sum(reached) / len(reached)


def test_fkr_equals_the_definition():
    random = np.random.default_rng(2)
    labels = random.integers(0, 4, size=80)
    z = random.standard_t(4, size=(2, 80, 30)) * random.uniform(0.1, 9, size=30)
    result = analyze_fkr(Collected(z, feature_set(labels)), "post_max")
    shares = [point["k"] for point in result["curve"]]
    assert shares == sorted(SHARES)
    for layer in range(2):
        for point in result["layers"][layer]["curve"]:
            expected = slow_fkr(z[layer], labels, 4, point["k"])
            assert point["fkr"] == pytest.approx(expected, abs=1e-6)
    assert result["layers"][0]["fkr"] == pytest.approx(slow_fkr(z[0], labels, 4, 0.02), abs=1e-6)
    assert result["least"] == min(result["curve"], key=lambda point: point["fkr"])


def test_the_curve_pools_the_layers():
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, size=60)
    z = random.normal(size=(2, 60, 20))
    result = analyze_fkr(Collected(z, feature_set(labels)), "post_max")
    for at, point in enumerate(result["curve"]):
        mean = np.mean([layer["curve"][at]["fkr"] for layer in result["layers"]])
        assert point["fkr"] == pytest.approx(mean, abs=1e-9)


def test_a_neuron_that_fires_for_one_feature_only_is_never_killed_falsely():
    labels = np.repeat(np.arange(10), 10)
    z = np.zeros((100, 20)) + np.random.default_rng(0).normal(size=(100, 20)) * 1e-3
    for neuron in range(20):
        z[labels == neuron % 10, neuron] += 1
    _, false, _ = killed(z, labels, 10, shares=(0.01, 0.1))
    np.testing.assert_array_equal(false, 0)


def test_a_neuron_that_fires_for_all_features_is_killed_falsely_nearly_always():
    random = np.random.default_rng(0)
    features, passages = 5, 20_000
    labels = np.arange(passages) % features
    z = (random.random((passages, 20)) < 0.05).astype(float) + random.normal(
        size=(passages, 20)
    ) / 99
    reached, false, at_random = killed(z, labels, features, shares=(0.05,))
    assert false[0] / reached[0] == pytest.approx(1 - 1 / features, abs=0.02)
    assert at_random == pytest.approx(1 - 1 / features)


def test_all_entries_that_tie_with_tau_are_counted():
    labels = np.array([0, 0, 0, 1, 1, 1])
    z = np.array([1.0, 1, 0, 0, 0, 0])[:, None]
    reached, false, _ = killed(z, labels, 2, shares=(0.1,))
    assert (reached[0], false[0]) == (2, 0)


def test_dead_neurons_do_not_count_and_a_dead_model_is_refused():
    random = np.random.default_rng(0)
    labels = np.arange(40) % 4
    z = random.normal(size=(40, 10))
    with_dead = np.concatenate([z, np.ones((40, 5))], axis=1)
    for a, b in zip(killed(z, labels, 4), killed(with_dead, labels, 4), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="varies"):
        analyze_fkr(Collected(np.zeros((2, 40, 3)), feature_set(labels)), "post_max")
