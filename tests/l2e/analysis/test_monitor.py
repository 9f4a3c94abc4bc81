"""The monitor during training gives what the analyses give on the same passages."""

import numpy as np
import pytest
import torch

from l2e.analysis.activations import Collection, collect, watch
from l2e.analysis.fkr import analyze_fkr
from l2e.analysis.monitor import Monitor
from l2e.analysis.scale import layer_scale


class Bytes:
    """The trainer's tokenizers have encode(text) -> ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text):
        return self.tokenizer(text)["input_ids"]


def observe_in(network, part=slice(None)):
    """The network's activations, or some neurons' alone."""

    def observe(tokens, hook):
        def show(layer, _, post):
            hook(str(layer), post[..., part])

        with torch.no_grad(), watch(network, show):
            network.model(tokens, use_cache=False)

    return observe


@pytest.fixture
def monitor(neox, letter_features):
    return Monitor(letter_features, Bytes(neox.tokenizer), batch_size=16, max_tokens=30)


def test_numbers_equal_the_analyses(neox, letter_features, monitor, tmp_path):
    seen = monitor.run(observe_in(neox))
    settings = Collection(("post_max",), max_tokens=30, stored_as="float32")
    found = collect(neox, letter_features, settings, tmp_path, progress=False)
    fkr = analyze_fkr(found, "post_max")
    for layer in range(3):
        z = np.asarray(found.layer("post_max", layer))
        scale = layer_scale(z, letter_features.labels, 3)
        entry = seen["layers"][str(layer)]
        assert entry["mean_ms"] == pytest.approx(scale.of_best().mean(), rel=1e-4)
        assert entry["fkr"] == pytest.approx(fkr["layers"][layer]["fkr"], abs=2e-3)
        assert 0 < entry["ks"] < 1
    assert seen["seconds"] > 0


def test_shards_joined_give_the_whole(neox, monitor):
    """Two tensor-parallel ranks hold half of the neurons each; gather joins them."""
    whole = monitor.run(observe_in(neox))
    theirs = []
    monitor.run(observe_in(neox, slice(64, None)), lambda z: (theirs.append(z), z)[1])

    def gather(ours):
        return torch.cat([ours, theirs.pop(0)], dim=1)

    halves = monitor.run(observe_in(neox, slice(64)), gather)
    for name in ("0", "1", "2"):
        assert halves["layers"][name] == pytest.approx(whole["layers"][name])


def test_every_batch_has_one_shape(neox, monitor):
    shapes = []
    monitor.run(lambda tokens, _: shapes.append(tuple(tokens.shape)))
    assert set(shapes) == {(16, 30)}
    assert len(shapes) == 8


def test_a_dead_layer_has_no_silent_number(neox, monitor):
    with torch.no_grad():
        neox.layers[1].inward.weight.zero_()
    entry = monitor.run(observe_in(neox))["layers"]["1"]
    assert entry == {"mean_ms": None, "ks": None, "fkr": None}


def test_interval_keeps_the_forward_passes_below_half_a_percent(monitor):
    tokens = monitor.tokens.numel()
    for tokens_per_step in (100, 10_000, 10_000_000):
        interval = monitor.interval(tokens_per_step)
        assert tokens / 3 <= 0.005 * interval * tokens_per_step
        assert interval == 1 or tokens / 3 > 0.005 * (interval - 1) * tokens_per_step
