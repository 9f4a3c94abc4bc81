"""Ablated losses against a direct run of the whole model with the activation replaced."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from l2e.analysis import ablation
from l2e.analysis.ablated_runs import Passages
from l2e.analysis.ablation import AblationOptions, ablation_losses, analyze_ablation

NEURONS = [(0, 3), (1, 17), (2, 90), (1, 4)]


def direct(network, features, neuron=None, value=0.0):
    """Losses per feature, one unpadded passage at a time, the whole model run again."""
    handle = None
    if neuron is not None:
        layer, index = neuron

        def replace(_, __, out):
            out = out.clone()
            out[..., index] = value
            return out

        handle = network.layers[layer].activation.register_forward_hook(replace)
    sums, counts = np.zeros(len(features.names)), np.zeros(len(features.names))
    for text, label in zip(features.texts, features.labels, strict=True):
        ids = torch.tensor([network.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = network.model(ids).logits[0, :-1]
        sums[label] += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        counts[label] += ids.shape[1] - 1
    if handle:
        handle.remove()
    return sums / counts


def mean_activation(network, features, neuron):
    layer, index = neuron
    seen = []
    handle = network.layers[layer].activation.register_forward_hook(
        lambda _, __, out: seen.append(out[0, :, index])
    )
    for text in features.texts:
        with torch.no_grad():
            network.model(torch.tensor([network.tokenizer(text)["input_ids"]]))
    handle.remove()
    return torch.cat(seen).mean().item()


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_losses_equal_a_direct_recomputation(network, letter_features, how):
    features = letter_features.sample(6)
    found = ablation_losses(network, features, NEURONS, AblationOptions(how=how), progress=False)
    np.testing.assert_allclose(found.base, direct(network, features), rtol=1e-6)
    for rise, neuron in zip(found.rise, NEURONS, strict=True):
        value = mean_activation(network, features, neuron) if how == "mean" else 0.0
        expected = direct(network, features, neuron, value)
        np.testing.assert_allclose(found.base + rise, expected, rtol=2e-6)
        assert np.abs(rise).max() > 1e-5
    assert not found.stderr.any()
    assert found.exact is None


def test_resampling_changes_the_loss_and_repeats_itself(neox, letter_features):
    features = letter_features.sample(6)
    settings = AblationOptions(how="resample")
    first = ablation_losses(neox, features, NEURONS, settings, progress=False)
    again = ablation_losses(neox, features, NEURONS, settings, progress=False)
    zero = ablation_losses(neox, features, NEURONS, AblationOptions(how="zero"), progress=False)
    np.testing.assert_array_equal(first.rise, again.rise)
    assert np.abs(first.rise).max() > 1e-5
    assert np.abs(first.rise - zero.rise).max() > 1e-5


def test_a_dead_output_weight_changes_nothing(neox, letter_features):
    with torch.no_grad():
        neox.layers[1].outward.weight[:, 17] = 0
    found = ablation_losses(
        neox, letter_features.sample(4), [(1, 17)], AblationOptions(how="zero"), progress=False
    )
    np.testing.assert_allclose(found.rise, 0, atol=1e-7)


def test_scored_positions_are_a_sample_of_all(neox, letter_features):
    """With at most n scored a passage, short passages count whole and long ones in part."""
    features = letter_features.sample(6)
    whole = ablation_losses(neox, features, NEURONS, AblationOptions(scored=128), progress=False)
    everything = ablation_losses(neox, features, NEURONS, AblationOptions(), progress=False)
    some = ablation_losses(neox, features, NEURONS, AblationOptions(scored=4), progress=False)
    np.testing.assert_allclose(whole.rise, everything.rise, rtol=1e-12)
    assert np.abs(some.base - everything.base).max() > 1e-4
    np.testing.assert_allclose(some.base, everything.base, rtol=0.2)


def test_bfloat16_is_close(neox, letter_features):
    features = letter_features.sample(6)
    full = ablation_losses(neox, features, NEURONS, AblationOptions(), progress=False)
    half = ablation_losses(
        neox, features, NEURONS, AblationOptions(precision="bfloat16"), progress=False
    )
    np.testing.assert_allclose(half.base + half.rise, full.base + full.rise, rtol=0.01)


@pytest.fixture
def long_job(neox, letter_features):
    """Exact losses of 24 neurons on 40 passages of each feature, and the neurons."""
    features = letter_features.sample(40)
    neurons = [(layer, index) for layer in range(3) for index in range(0, 128, 16)]
    return (
        features,
        neurons,
        ablation_losses(neox, features, neurons, AblationOptions(), progress=False),
    )


def test_a_sample_estimates_what_all_passages_give(neox, long_job):
    """With standard errors that say how far off it is, and better than the sample alone."""
    features, neurons, exact = long_job
    some = ablation_losses(neox, features, neurons, AblationOptions(exact=6), progress=False)
    np.testing.assert_allclose(some.base, exact.base, rtol=1e-6)
    assert some.exact == 6
    assert some.correlation > 0.9
    error = some.rise - exact.rise
    z = error / some.stderr
    assert 0.5 < np.sqrt((z**2).mean()) < 2  # 72 of them; 1 if the errors were independent
    alone = ablation_losses(
        neox, sampled(neox, features, 6), neurons, AblationOptions(), progress=False
    )
    assert np.abs(error).mean() < 0.5 * np.abs(alone.rise - exact.rise).mean()


def sampled(network, features, count):
    return features.subset(Passages(network, features, 128, None).sample(count))


def test_the_first_order_is_exact_for_a_change_that_is_small(neox, long_job):
    """With tiny output weights a rise is linear: nothing is left for the sample to mend."""
    features, neurons, _ = long_job
    with torch.no_grad():
        for layer in neox.layers:
            layer.outward.weight.mul_(1e-2)
    exact = ablation_losses(neox, features, neurons, AblationOptions(), progress=False)
    some = ablation_losses(neox, features, neurons, AblationOptions(exact=2), progress=False)
    np.testing.assert_allclose(some.rise, exact.rise, atol=3e-2 * np.abs(exact.rise).max())
    assert some.correlation > 0.999


def test_a_job_that_takes_too_long_is_sampled_aloud(neox, letter_features, monkeypatch, capsys):
    features = letter_features.sample(10)
    whole = ablation_losses(neox, features, NEURONS, AblationOptions(), progress=False)
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(ablation.EXACT_FLOPS, "cpu", 1e7)
    some = ablation_losses(neox, features, NEURONS, AblationOptions(), progress=False)
    assert 2 <= some.exact < 10
    assert f"{some.exact} passages of each feature run exactly" in capsys.readouterr().out
    forced = ablation_losses(neox, features, NEURONS, AblationOptions(exact=10), progress=False)
    np.testing.assert_array_equal(forced.rise, whole.rise)
    with pytest.raises(ValueError, match="at least 2"):
        AblationOptions(exact=1)


def test_result_names_neurons_and_draws_random_ones_from_their_layers(neox, letter_features):
    result = analyze_ablation(
        neox, letter_features.sample(4), [(0, 3), (2, 9)], AblationOptions(random=6), progress=False
    )
    assert [row["neuron"] for row in result["neurons"]] == ["L0.N3", "L2.N9"]
    assert {row["neuron"].split(".")[0] for row in result["random"]} == {"L0", "L2"}
    assert len(result["random"]) == 6
    assert set(result["loss"]) == set(letter_features.names)
    assert set(result["neurons"][0]["increase_percent"]) == set(letter_features.names)


def test_a_neuron_beyond_the_model_is_named(neox, letter_features):
    with pytest.raises(ValueError, match=r"L3.N1.*3 layers of 128"):
        analyze_ablation(neox, letter_features, [(3, 1)], AblationOptions(), progress=False)
