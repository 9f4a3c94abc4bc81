"""Proxies against their formulas, pair by pair, and neurons whose value is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from l2e.analysis.activations import Collection, collect
from l2e.analysis.proxies import analyze_proxies, bias_norm, decorrelation, sparsity
from l2e.analysis.scale import layer_scale


def test_bias_norm_is_that_of_the_weights(neox):
    linear = neox.model.gpt_neox.layers[1].mlp.dense_h_to_4h
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    expected = [bias[j] * np.sqrt(np.sum(weight[j] ** 2)) for j in range(128)]
    np.testing.assert_allclose(bias_norm(neox.layers[1]), expected, rtol=1e-5)


def test_decorrelation_is_one_less_the_mean_cosine_of_all_pairs():
    z = np.random.default_rng(0).normal(size=(12, 5)) + 1
    cosines = [
        z[a] @ z[b] / np.linalg.norm(z[a]) / np.linalg.norm(z[b])
        for a in range(12)
        for b in range(12)
        if a != b
    ]
    assert decorrelation(z) == pytest.approx(1 - np.mean(cosines))
    assert decorrelation(np.ones((4, 3))) == pytest.approx(0)
    assert decorrelation(np.eye(4)) == pytest.approx(1)


def test_sparsity_of_known_neurons():
    z = np.zeros((100, 3))
    z[:, 0] = np.tile([-2.0, 2.0], 50)
    z[7, 1] = 5.0
    found = sparsity(z)
    assert found[0] == pytest.approx(0)
    assert found[1] == pytest.approx(0.99)
    assert np.isnan(found[2])


def test_result_correlates_measures_over_neurons(network, letter_features, tmp_path):
    found = collect(
        network, letter_features, Collection(stored_as="float32"), tmp_path, progress=False
    )
    result = analyze_proxies(network, found, "post_max")
    assert len(result["layers"]) == 3
    if network.family == "llama":
        assert result["layers"][0]["bias_norm"] is None
        assert "no input biases" in result["layers"][0]["reason"]
        assert "bias_norm" not in result["rank_correlations"]
        return
    z = np.asarray(found.layer("post_max", 2), dtype=np.float64)
    ms = layer_scale(z, letter_features.labels, 3).of_best()
    expected = spearmanr(bias_norm(network.layers[2]), ms).statistic
    row = result["layers"][2]["rank_correlation_with_ms"]
    assert row["bias_norm"] == pytest.approx(expected)
    matrix = result["rank_correlations"]
    assert matrix["ms"]["ms"] == pytest.approx(1)
    assert matrix["ms"]["kurtosis"] == pytest.approx(matrix["kurtosis"]["ms"])
