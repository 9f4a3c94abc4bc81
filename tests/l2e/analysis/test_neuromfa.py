"""NeuroMFA over a series: invariances, the scale confound and its control, and bad series."""

import numpy as np
import pytest
import torch

from l2e.analysis.interaction import node_counts, open_weights
from l2e.analysis.multifractal import spectrum
from l2e.analysis.neuromfa import (
    NeuroMFAOptions,
    analyze_neuromfa,
    emergence,
    gaussian,
    shuffled,
)
from l2e.analysis.series import read_series
from tests.tiny_models import gpt_neox

FEW = NeuroMFAOptions(networks=3)


def save_gaussian(folder, factor=1.0, layers=2, seed=0):
    """A model of Gaussian weights times `factor`."""
    torch.manual_seed(seed)
    model = gpt_neox(layers, 96)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02).mul_(factor)
    model.save_pretrained(folder)
    [checkpoint] = read_series([str(folder)])
    return open_weights(checkpoint)


@pytest.fixture(scope="module")
def scaled_series(tmp_path_factory):
    """Step 0, independent Gaussian weights of the same scale, and such weights times 1.5."""
    folder = tmp_path_factory.mktemp("series")
    return [
        save_gaussian(folder / "step0"),
        save_gaussian(folder / "step1", seed=1),
        save_gaussian(folder / "step2", seed=2, factor=1.5),
    ]


def test_emergence_is_zero_at_step_zero(scaled_series):
    start = analyze_neuromfa(scaled_series, FEW, progress=False)["checkpoints"][0]
    assert start["E"] == 0
    assert [control["E"] for control in start["controls"].values()] == [0, 0, 0]
    assert start["fit_r2"] > 0.5
    assert start["kept_nodes"] == start["nodes"] == 2 * 5 * 64


def test_scale_alone_raises_emergence_and_the_rescaled_control_shows_it(scaled_series):
    found = analyze_neuromfa(scaled_series, NeuroMFAOptions(), progress=False)["checkpoints"]
    same, larger = found[1], found[2]
    error = 4 * larger["controls"]["rescaled"]["E_std"] / np.sqrt(10)
    assert abs(same["E"]) < error
    assert larger["E"] > 0.15
    assert larger["E"] > 5 * error
    assert abs(larger["controls"]["rescaled"]["E"]) < error
    # Gaussian and shuffled weights have the scale and no structure: they show the same E.
    for name in ("gaussian", "shuffled"):
        assert larger["controls"][name]["E"] == pytest.approx(larger["E"], abs=3 * error)
    assert larger["weight_norm"] == pytest.approx(1.5 * same["weight_norm"], rel=0.02)
    degree = larger["mean_weighted_degree"] / same["mean_weighted_degree"]
    assert degree == pytest.approx(1.5, rel=0.02)


def test_order_and_signs_of_weights_change_nothing():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(40, 60)) * 0.03
    changed = matrix[random.permutation(40)][:, random.permutation(60)]
    changed = changed * random.choice([-1, 1], size=changed.shape)
    before, after = (spectrum(node_counts([m], 150)) for m in (matrix, changed))
    np.testing.assert_allclose(before.tau, after.tau, atol=1e-12)


def test_controls_keep_what_they_claim():
    random = np.random.default_rng(0)
    network = [random.normal(0.01, 0.02, size=(64, 128)), random.normal(0, 1, size=(64, 64))]
    for before, after in zip(network, shuffled(network, random), strict=True):
        np.testing.assert_array_equal(np.sort(before.ravel()), np.sort(after.ravel()))
        assert not np.array_equal(before, after)
    for before, after in zip(network, gaussian(network, random), strict=True):
        assert after.mean() == pytest.approx(before.mean(), abs=5 * before.std() / 64)
        assert after.std() == pytest.approx(before.std(), rel=0.05)


def test_a_series_without_step_zero_has_no_emergence_and_says_why(tmp_path):
    found = analyze_neuromfa([save_gaussian(tmp_path / "step5")], FEW, progress=False)
    entry = found["checkpoints"][0]
    assert found["step_0"] is None
    assert entry["alpha_0"] > 0
    assert entry["E"] is None
    assert "step 0" in entry["reason"]
    assert "step 0" in entry["controls"]["rescaled"]["reason"]


def test_a_series_of_different_shapes_is_refused(tmp_path):
    series = [save_gaussian(tmp_path / "step0"), save_gaussian(tmp_path / "step1", layers=3)]
    with pytest.raises(ValueError, match="must be of one model"):
        analyze_neuromfa(series, FEW, progress=False)


def test_a_threshold_that_keeps_no_node_is_refused(tmp_path):
    with pytest.raises(ValueError, match="threshold"):
        analyze_neuromfa(
            [save_gaussian(tmp_path / "step0")],
            NeuroMFAOptions(networks=1, threshold=2),
            progress=False,
        )


def test_a_checkpoint_that_keeps_no_node_has_its_reason(tmp_path):
    series = [save_gaussian(tmp_path / "step0"), save_gaussian(tmp_path / "step1", factor=1e-4)]
    found = analyze_neuromfa(series, FEW, progress=False)["checkpoints"][1]
    assert found["alpha_0"] is None
    assert found["E"] is None
    assert "threshold" in found["reason"]


def test_emergence_formula():
    assert emergence(0.8, 0.6, 1.0, 0.4) == pytest.approx(1.5 * np.log(1.25))
    with pytest.raises(ValueError, match="positive"):
        emergence(0.8, 0.6, 1.0, 0.0)
