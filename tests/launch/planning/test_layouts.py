"""The planner against costs worked out elsewhere, and against the rules its layouts must keep."""

from dataclasses import replace

import pytest

from configs import Config
from launch.planning.cost import LayoutPlan
from launch.planning.layouts import (
    SIMPLER_WITHIN,
    estimate,
    fastest,
    largest_model,
    layout_of,
    rank_layouts,
)
from launch.planning.speed import GPUS
from tests.launch.planning.test_cost import PYTHIA, Shape

H200 = GPUS["h200"]
SEVEN_BILLION = Shape(32, 4096, 32, 16384)


def batch(ranks: int, sequences: int = 1024) -> LayoutPlan:
    return LayoutPlan(micro_batch_size=sequences // ranks, data=ranks, inhibited_layers=2)


@pytest.mark.parametrize(("shape", "ranks"), [(PYTHIA["410m"], 8), (SEVEN_BILLION, 48)])
def test_layouts_keep_the_trainers_rules(shape, ranks):
    ranked = rank_layouts(shape, batch(ranks, 48 * 16), ranks, H200)
    for layout in (candidate.layout for candidate in ranked):
        assert layout.ranks == ranks
        assert layout.micro_batch_size * layout.accumulation * layout.data == 48 * 16
        assert shape.num_attention_heads % layout.tensor == 0
        assert layout.tensor <= 8
        assert layout.pipeline == 1 or layout.zero_stage == 1


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_a_small_model_is_only_data_parallel_and_keeps_its_weights_whole(gpus):
    chosen = rank_layouts(PYTHIA["70m"], batch(gpus), gpus, H200)[0].layout
    assert (chosen.tensor, chosen.pipeline, chosen.data) == (1, 1, gpus)
    assert chosen.zero_stage == 1
    assert not chosen.checkpointing


def test_what_is_asked_for_is_kept_where_nothing_is_clearly_better():
    wanted = replace(batch(8), micro_batch_size=32, accumulation=4)
    assert rank_layouts(PYTHIA["70m"], wanted, 8, H200)[0].layout == wanted


def test_the_largest_model_fits_and_the_next_does_not():
    shape, best = largest_model(8, H200, batch(8))
    assert best.fits
    assert 30e9 < 12 * shape.num_layers * shape.hidden_size**2 < 141e9 * 8 / 16
    larger = replace(shape, num_layers=shape.num_layers + 4)
    assert not rank_layouts(larger, batch(8), 8, H200)[0].fits


def test_a_model_too_large_for_one_gpu_is_spread():
    """6.9B needs 134 GB for weights, gradients and Adam alone: more than an A100 holds."""
    chosen = rank_layouts(SEVEN_BILLION, batch(8), 8, GPUS["a100"])[0]
    alone = estimate(SEVEN_BILLION, batch(1), GPUS["a100"])
    assert not alone.fits
    assert chosen.fits


def test_what_fits_comes_first_and_the_first_is_nearly_the_fastest():
    ranked = rank_layouts(PYTHIA["2.8b"], batch(8), 8, GPUS["a100"])
    fits = [candidate.fits for candidate in ranked]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    assert ranked[0].step_seconds < (1 + SIMPLER_WITHIN) * fastest(ranked).step_seconds


def test_where_nothing_fits_the_smallest_comes_first():
    huge = replace(SEVEN_BILLION, hidden_size=16384, intermediate_size=65536)
    ranked = rank_layouts(huge, batch(1), 1, H200)
    assert not any(candidate.fits for candidate in ranked)
    assert ranked[0].total_memory == min(candidate.total_memory for candidate in ranked)


def configuration(tensor: int = 1, pipeline: int = 1, **train) -> Config:
    return Config.model_validate(
        {
            "model": {"preset": "70m"},
            "data": {"sequence_length": 128},
            "parallel": {"tensor": tensor, "pipeline": pipeline},
            "train": {"global_batch_size": 64, "micro_batch_size": 4} | train,
        }
    )


def test_layout_of_a_configuration():
    layout = layout_of(configuration(tensor=2), ranks=8)
    assert (layout.tensor, layout.data, layout.accumulation) == (2, 4, 4)
    assert layout.step_tokens == 64 * 128
    assert layout.inhibited_layers == 2


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"tensor": 3}, 8, r"8 GPUs: not a multiple of .* = 3"),
        ({"tensor": 2, "pipeline": 2}, 2, r"2 GPUs: not a multiple of .* = 4"),
        ({"micro_batch_size": 5}, 4, r"train.global_batch_size = 64: .* 5 x 4"),
        ({"global_batch_size": 4}, 4, r"train.global_batch_size = 4: .* 4 x 4"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(changes, ranks, message):
    with pytest.raises(ValueError, match=message):
        layout_of(configuration(**changes), ranks)


def test_gpus_that_no_layout_uses_are_refused():
    with pytest.raises(ValueError, match="no layout of 7 GPUs"):
        rank_layouts(PYTHIA["70m"], LayoutPlan(micro_batch_size=1), 7, H200)
