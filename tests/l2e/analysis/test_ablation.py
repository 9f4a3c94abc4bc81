"""Ablated losses against a direct run of the whole model with the activation replaced."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from l2e.analysis.ablation import Settings, ablation_losses, analyze_ablation

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
    found = ablation_losses(network, features, NEURONS, Settings(how=how), progress=False)
    np.testing.assert_allclose(found[0], direct(network, features), rtol=1e-6)
    for row, neuron in enumerate(NEURONS, 1):
        value = mean_activation(network, features, neuron) if how == "mean" else 0.0
        expected = direct(network, features, neuron, value)
        np.testing.assert_allclose(found[row], expected, rtol=2e-6)
        assert np.abs(found[row] - found[0]).max() > 1e-5


def test_resampling_changes_the_loss_and_repeats_itself(neox, letter_features):
    features = letter_features.sample(6)
    settings = Settings(how="resample")
    first = ablation_losses(neox, features, NEURONS, settings, progress=False)
    again = ablation_losses(neox, features, NEURONS, settings, progress=False)
    zero = ablation_losses(neox, features, NEURONS, Settings(how="zero"), progress=False)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[1:] - first[0]).max() > 1e-5
    assert np.abs(first[1:] - zero[1:]).max() > 1e-5


def test_a_dead_output_weight_changes_nothing(neox, letter_features):
    with torch.no_grad():
        neox.layers[1].outward.weight[:, 17] = 0
    found = ablation_losses(
        neox, letter_features.sample(4), [(1, 17)], Settings(how="zero"), progress=False
    )
    np.testing.assert_allclose(found[1], found[0], rtol=1e-7)


def test_scored_positions_are_a_sample_of_all(neox, letter_features):
    """With at most n scored a passage, short passages count whole and long ones in part."""
    features = letter_features.sample(6)
    whole = ablation_losses(neox, features, NEURONS, Settings(scored=128), progress=False)
    everything = ablation_losses(neox, features, NEURONS, Settings(), progress=False)
    some = ablation_losses(neox, features, NEURONS, Settings(scored=4), progress=False)
    np.testing.assert_allclose(whole, everything, rtol=1e-12)
    assert np.abs(some - everything).max() > 1e-4
    np.testing.assert_allclose(some, everything, rtol=0.2)


def test_bfloat16_is_close(neox, letter_features):
    features = letter_features.sample(6)
    full = ablation_losses(neox, features, NEURONS, Settings(), progress=False)
    half = ablation_losses(neox, features, NEURONS, Settings(precision="bfloat16"), progress=False)
    np.testing.assert_allclose(half, full, rtol=0.01)


def test_result_names_neurons_and_draws_random_ones_from_their_layers(neox, letter_features):
    result = analyze_ablation(
        neox, letter_features.sample(4), [(0, 3), (2, 9)], 6, Settings(), progress=False
    )
    assert [row["neuron"] for row in result["neurons"]] == ["L0.N3", "L2.N9"]
    assert {row["neuron"].split(".")[0] for row in result["random"]} == {"L0", "L2"}
    assert len(result["random"]) == 6
    assert set(result["loss"]) == set(letter_features.names)
    assert set(result["neurons"][0]["increase_percent"]) == set(letter_features.names)


def test_a_neuron_beyond_the_model_is_named(neox, letter_features):
    with pytest.raises(ValueError, match=r"L3.N1.*3 layers of 128"):
        analyze_ablation(neox, letter_features, [(3, 1)], 0, Settings(), progress=False)
