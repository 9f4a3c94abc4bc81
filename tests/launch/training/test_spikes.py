"""Losses that jump are told from noise, from a falling loss and from a new level."""

import json
import math
import re

import numpy as np
import pytest

from data import open_dataset
from data.show import describe_samples
from launch.training.bad_steps import Rollback
from launch.training.spikes import ENOUGH, WINDOW, Spikes
from tests.data.conftest import write_tokens
from tests.distributed.checkpointing import make_config


def spikes(said: list, **train) -> Spikes:
    return Spikes(make_config(train=train), lambda step: f"batch {step}", said.append)


def records(losses, first: int = 1) -> list[dict]:
    return [{"step": step, "lm_loss": float(loss)} for step, loss in enumerate(losses, first)]


def seen(losses, **train) -> list[int]:
    """The steps that are told."""
    said: list[str] = []
    watch = spikes(said, **train)
    watch.count(records(losses))
    watch.judge()
    return [int(re.search(r"at step (\d+):", line)[1]) for line in said]


def falling(steps: int, noise: float, seed: int = 0) -> np.ndarray:
    """A loss as training makes it: a power law, and noise of the batches."""
    random = np.random.default_rng(seed)
    return 2 + 8 * (1 + np.arange(steps)) ** -0.3 + noise * random.standard_normal(steps)


def test_a_run_without_spikes_tells_none() -> None:
    """Twenty runs of a thousand steps; eight standard deviations are never met by chance."""
    for seed in range(20):
        assert seen(falling(1000, 0.05, seed)) == []


def test_spikes_are_told_where_they_are_and_move_the_estimate_little() -> None:
    losses = falling(1000, 0.05)
    jumps = {300: 1.0, 301: 1.5, 302: 3.0, 640: 0.9, 641: 50.0}
    for step, jump in jumps.items():
        losses[step - 1] += jump
    assert seen(losses) == sorted(jumps)


def test_a_new_level_is_no_spike_for_ever() -> None:
    losses = falling(1000, 0.05)
    losses[500:] += 2.0
    told = seen(losses)
    assert told[0] == 501
    assert WINDOW // 4 < len(told) <= WINDOW


def test_what_is_no_spike() -> None:
    dip = falling(300, 0.05)
    dip[200] -= 3
    constant = np.full(300, 2.0)
    constant[200] += 0.01  # nothing has any spread: within its least
    early = falling(300, 0.05)
    early[ENOUGH - 2] += 5  # before there is an estimate
    broken = falling(300, 0.05)
    broken[200] = math.nan  # told elsewhere
    for losses in (dip, constant, early, broken):
        assert seen(losses) == []
    loud = falling(300, 0.05)
    loud[200] += 5
    assert seen(loud, spike_threshold=0) == []
    assert seen(loud, spike_threshold=200.0) == []


def test_counts_and_the_way_back() -> None:
    losses = falling(300, 0.05)
    losses[270] += 4
    said: list[str] = []
    watch = spikes(said, on_spike="rollback")
    first, second = records(losses[:260]), records(losses[260:], 261)
    watch.count(first)
    watch.judge()
    watch.count(second)
    assert [one["loss_spikes"] for one in first + second] == [0] * 270 + [1] * 30
    with pytest.raises(Rollback, match=r"jumped at step 271: .* batch 271") as caught:
        watch.judge()
    assert caught.value.step == 271
    watch.judge()  # once
    assert said == []


def test_a_batch_is_told_with_its_subsets(tmp_path) -> None:
    """Ten documents of one subset and thirty of another, each of one sample's length."""
    from data import manifest

    prefix = write_tokens(tmp_path / "x", [np.full(33, n % 7) for n in range(40)])
    numbers = np.repeat(np.array([0, 1], np.int32), (10, 30))
    numbers.tofile(f"{prefix}.subsets")
    told = {key: kind() for key, kind in manifest.REQUIRED.items()}
    told |= {"documents": 40, "subsets": {"Books": {}, "Code": {}}}
    manifest.path(prefix).write_text(json.dumps(told))
    samples = open_dataset(prefix, 32, seed=1, samples=40, order="preshuffled")
    assert describe_samples(samples, range(8, 12)) == "samples 8 to 11, Books 50.0%, Code 50.0%"
    assert describe_samples(samples, range(9, 13)) == "samples 9 to 12, Code 75.0%, Books 25.0%"
    books, code = [np.full(10, 1)] * 20, [np.full(40, 2)] * 20  # by length most is Code
    mixed = write_tokens(tmp_path / "y", [*books, *code])
    np.repeat(np.array([0, 1], np.int32), (20, 20)).tofile(f"{mixed}.subsets")
    manifest.path(mixed).write_text(json.dumps(told))
    one = open_dataset(mixed, 499, seed=1, samples=1)
    share = (np.asarray(one[0]) == 2).mean()
    assert f"Code {share:.1%}, Books {1 - share:.1%}" in describe_samples(one, range(1))
