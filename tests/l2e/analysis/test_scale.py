"""phi_l, phi_l-minus, l* and K-S against loops over passages and neurons, and hand-made cases."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import ks_2samp

from l2e.analysis import scale as scale_module
from l2e.analysis.features import make_features
from l2e.analysis.probing import Probe
from l2e.analysis.scale import analyze_scale, kolmogorov_smirnov, layer_scale, passage_scale


@dataclass
class Collected:
    """Activations held in memory: z [layers, passages, neurons]."""

    z: np.ndarray
    features: object

    @property
    def num_layers(self):
        return len(self.z)

    def layer(self, kind, layer):
        return self.z[layer]


def feature_set(labels):
    return make_features("made", [f"t{i}" for i in range(len(labels))], [f"f{i}" for i in labels])


def slow(z, labels, features):
    """The definitions of L2E's Equations 2 and 3, one neuron and one passage at a time."""
    passages, neurons = z.shape
    phi = np.zeros((passages, neurons))
    by, others = np.zeros((features, neurons)), np.zeros((features, neurons))
    for j in range(neurons):
        mean = sum(z[:, j]) / passages
        variance = sum((value - mean) ** 2 for value in z[:, j]) / (passages - 1)
        for i in range(passages):
            phi[i, j] = (z[i, j] - mean) ** 2 / variance
        for l in range(features):  # noqa: E741 - the papers' name
            by[l, j] = np.mean([phi[i, j] for i in range(passages) if labels[i] == l])
            others[l, j] = np.mean([phi[i, j] for i in range(passages) if labels[i] != l])
    return phi, by, others, by.argmax(axis=0)


@pytest.fixture
def random_case():
    random = np.random.default_rng(1)
    labels = random.permutation(np.repeat([0, 1, 2], [30, 50, 20]))
    z = random.standard_t(3, size=(100, 40)) + random.normal(size=40) * 5
    return z, labels


def test_scales_equal_the_definition(random_case, monkeypatch):
    monkeypatch.setattr(scale_module, "NEURONS_AT_ONCE", 7)
    z, labels = random_case
    phi, by, others, best = slow(z, labels, 3)
    found = layer_scale(z, labels, 3)
    np.testing.assert_allclose(found.by_feature, by, rtol=1e-9)
    np.testing.assert_allclose(found.of_others, others, rtol=1e-9)
    np.testing.assert_array_equal(found.best, best)
    np.testing.assert_allclose(passage_scale(z, found.mean, found.std), phi, rtol=1e-9)


def test_ks_equals_the_largest_gap_of_the_empirical_distributions(random_case):
    z, labels = random_case
    phi, _, _, best = slow(z, labels, 3)
    own = labels[:, None] == best
    points = np.sort(phi.ravel())
    gap = max(abs(np.mean(phi[own] <= x) - np.mean(phi <= x)) for x in points)
    assert kolmogorov_smirnov(phi, own) == pytest.approx(gap, abs=1e-9)


def test_a_dead_neuron_has_no_feature_and_no_silent_number(random_case):
    z, labels = random_case
    z[:, 3] = 0.1
    found = layer_scale(z, labels, 3)
    assert found.best[3] == -1
    assert np.isnan(found.by_feature[:, 3]).all()
    assert np.isnan(found.of_best()[3])
    assert np.isfinite(found.of_best()[[0, 1, 2, 4]]).all()


def test_a_neuron_for_one_feature_is_told_from_one_for_none():
    labels = np.repeat([0, 1, 2, 3], 25)
    random = np.random.default_rng(0)
    z = random.normal(size=(1, 100, 60))
    z[0, labels == 2, 7] += 30
    probe = Probe(layer=0, neuron=7, feature="f2", f1=1.0, mcc=1.0, precision=1.0, recall=1.0)
    result = analyze_scale(Collected(z, feature_set(labels)), "post_max", [probe])
    top = result["top"][0]
    assert top["neuron"] == "L0.N7"
    # Three quarters of its variance are between the feature and the rest: phi_l is near 3.
    assert top["ms"] == pytest.approx(3, rel=0.05)
    assert top["ms_others"] == pytest.approx(1 / 3, rel=0.05)
    assert len(result["random"]) == 10
    assert all(row["ms"] < 2.5 for row in result["random"] if row["neuron"] != "L0.N7")


def test_layer_profile_and_ks_equal_the_definition_when_all_neurons_are_used(random_case):
    z, labels = random_case
    result = analyze_scale(Collected(z[None], feature_set(labels)), "post_max", [])
    phi, by, _, best = slow(z, labels, 3)
    layer = result["layers"][0]
    assert layer["neurons"] == 40
    assert layer["mean_ms"] == pytest.approx(by.max(axis=0).mean(), rel=1e-9)
    own = labels[:, None] == best
    assert result["ks"] == pytest.approx(ks_2samp(phi[own], phi.ravel()).statistic, abs=1e-9)


def test_a_layer_of_dead_neurons_says_so(random_case):
    z, labels = random_case
    result = analyze_scale(Collected(np.stack([z, z * 0]), feature_set(labels)), "post_max", [])
    assert "dead" in result["layers"][1]["reason"]
    assert result["ks"] is not None
