"""Collected activations against plain forward hooks, passage by passage and without padding."""

import numpy as np
import pytest
import torch

from l2e.analysis.activations import (
    Collection,
    collect,
    first_tokens,
    length_batches,
    tokenize,
)
from l2e.analysis.features import make_features
from l2e.analysis.kinds import KINDS


def by_hand(network, text, skip):
    """Each layer's activations of one unpadded passage: {site: [layers, positions, neurons]}."""
    found = {"pre": [], "post": []}
    handles = []
    for layer in network.layers:
        handles.append(
            layer.inward.register_forward_hook(lambda _, __, out: found["pre"].append(out))
        )
        handles.append(
            layer.activation.register_forward_hook(lambda _, __, out: found["post"].append(out))
        )
    with torch.no_grad():
        network.model(torch.tensor([network.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {site: torch.stack([v[0, skip:] for v in values]) for site, values in found.items()}


def test_activations_equal_forward_hooks(network, letter_features, tmp_path):
    settings = Collection(kinds=KINDS, skip=2, stored_as="float32", tokens_per_batch=100)
    found = collect(network, letter_features, settings, tmp_path, progress=False)
    for row in (0, 17, 118):
        expected = by_hand(network, letter_features.texts[row], skip=2)
        for kind in KINDS:
            site, how = kind.split("_")
            values = expected[site]
            values = values.amax(1) if how == "max" else values.mean(1)
            for layer in range(3):
                actual = found.layer(kind, layer)[row]
                np.testing.assert_allclose(actual, values[layer], rtol=1e-6, atol=1e-6)


def test_batches_waste_little_and_lose_nothing():
    lengths = np.array([3, 50, 49, 8, 7, 120, 2])
    batches = [lengths[rows] for rows in length_batches(lengths, 100)]
    assert sorted(np.concatenate(batches)) == [2, 3, 7, 8, 49, 50, 120]
    assert all(len(batch) * batch[0] <= 100 or len(batch) == 1 for batch in batches)
    longest = [batch.max() for batch in batches]
    assert longest == [batch[0] for batch in batches] == sorted(longest, reverse=True)


def test_float16_is_the_rounded_float32(neox, letter_features, tmp_path):
    half = collect(neox, letter_features, Collection(("post_max",)), tmp_path, progress=False)
    full = Collection(("post_max",), stored_as="float32")
    whole = collect(neox, letter_features, full, tmp_path, progress=False)
    assert half.layer("post_max", 1).dtype == np.float16
    np.testing.assert_array_equal(
        half.layer("post_max", 1), whole.layer("post_max", 1).astype(np.float16)
    )


def test_two_devices_give_what_one_gives(neox, letter_features, tmp_path):
    settings = Collection(("pre_mean",), tokens_per_batch=64)
    one = collect(neox, letter_features, settings, tmp_path / "one", progress=False)
    two = collect(
        neox, letter_features, settings, tmp_path / "two", devices=["cpu", "cpu"], progress=False
    )
    for layer in range(3):
        np.testing.assert_array_equal(one.layer("pre_mean", layer), two.layer("pre_mean", layer))


def test_cache_follows_weights_texts_and_settings(neox, letter_features, tmp_path, capsys):
    def key(features=letter_features, **settings):
        return collect(neox, features, Collection(**settings), tmp_path, progress=False).key

    first = key()
    assert "found" not in capsys.readouterr().out
    assert key() == first
    assert "activations found in" in capsys.readouterr().out
    assert key(skip=2) != first
    assert key(features=letter_features.sample(20)) != first
    with torch.no_grad():
        neox.layers[2].outward.bias[0] += 1e-3
    assert key() != first


def test_passages_without_a_valid_token_are_left_out_aloud(neox, tmp_path, capsys):
    features = make_features("x", ["abc", "a", "def", "gh"], ["u", "u", "v", "v"])
    found = collect(neox, features, Collection(skip=1), tmp_path, progress=False)
    assert found.dropped == 1
    assert found.features.texts == ["abc", "def", "gh"]
    assert found.layer("post_max", 0).shape == (3, 128)
    assert "1 passages of at most 1 tokens left out" in capsys.readouterr().out


def test_a_feature_without_usable_passage_is_refused(neox, tmp_path):
    features = make_features("x", ["abc", "a", "b"], ["u", "v", "v"])
    with pytest.raises(ValueError, match="feature v"):
        collect(neox, features, Collection(skip=1), tmp_path, progress=False)


def test_overflow_of_float16_is_refused_and_leaves_nothing(neox, letter_features, tmp_path):
    with torch.no_grad():
        neox.layers[1].inward.bias[5] = 1e6
    with pytest.raises(ValueError, match="beyond float16"):
        collect(neox, letter_features, Collection(), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="post_max"):
        Collection(kinds=("post_median",))


@pytest.mark.parametrize("unit", ["word ", "a", "     ", "ab,\n"])
def test_a_long_passage_costs_its_first_tokens_alone(neox, unit, monkeypatch):
    """The ids are the whole text's, from a small share of it."""
    text = unit * (3_000_000 // len(unit))
    read = []
    encode = neox.tokenizer

    def counting(texts, **settings):
        read.extend(map(len, texts))
        return encode(texts, **settings)

    monkeypatch.setattr(neox, "tokenizer", counting)
    [found] = tokenize(neox, [text], 16)
    assert found == encode(text[:1000])["input_ids"][:16]
    assert sum(read) < 3000


def test_a_text_of_few_tokens_is_read_to_its_end():
    """Ids that come late: one token for each 1,000 characters."""

    def encode(texts):
        return [[len(text[i : i + 1000]) for i in range(0, len(text), 1000)] for text in texts]

    text = "x" * 8500
    assert first_tokens(encode, [text, "y"], 4) == [[1000] * 4, [1]]
    assert first_tokens(encode, [text], 20) == [[1000] * 8 + [500]]
