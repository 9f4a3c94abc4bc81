"""The planner against costs worked out elsewhere, and against the rules its layouts must keep."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from launch.planning.cost import Layout
from launch.planning.layouts import GPUS, estimate, layout_of, rank_layouts
from tests.launch.planning.test_cost import PYTHIA, Shape

H200 = GPUS["h200"]
SEVEN_BILLION = Shape(32, 4096, 32, 16384)


def batch(ranks: int, sequences: int = 1024) -> Layout:
    return Layout(micro_batch_size=sequences // ranks, data=ranks, inhibited_layers=2)


@pytest.mark.parametrize(("preset", "hours"), [("70m", 7), ("410m", 57), ("2.8b", 377)])
def test_hours_of_a_tenth_of_pythia_on_one_h200(preset, hours):
    """30.0 billion tokens at 40 % of the peak, worked out by hand when the project was planned."""
    chosen = rank_layouts(PYTHIA[preset], batch(1), 1, H200)[0]
    assert chosen.fits
    assert 14300 * chosen.step_seconds / 3600 == pytest.approx(hours, rel=0.05)


@pytest.mark.parametrize(("shape", "ranks"), [(PYTHIA["410m"], 8), (SEVEN_BILLION, 48)])
def test_layouts_keep_the_trainers_rules(shape, ranks):
    ranked = rank_layouts(shape, batch(ranks, 48 * 16), ranks, H200)
    for layout in (candidate.layout for candidate in ranked):
        assert layout.ranks == ranks
        assert layout.micro_batch_size * layout.accumulation * layout.data == 48 * 16
        assert shape.num_attention_heads % layout.tensor == 0
        assert layout.tensor <= 8
        assert layout.pipeline == 1 or layout.zero_stage == 1


def test_a_small_model_is_only_data_parallel():
    chosen = rank_layouts(PYTHIA["70m"], batch(8), 8, H200)[0].layout
    assert (chosen.tensor, chosen.pipeline, chosen.data) == (1, 1, 8)
    assert not chosen.checkpointing


def test_a_model_too_large_for_one_gpu_is_spread():
    """6.9B needs 134 GB for weights, gradients and Adam alone: more than an A100 holds."""
    chosen = rank_layouts(SEVEN_BILLION, batch(8), 8, GPUS["a100"])[0]
    alone = estimate(SEVEN_BILLION, batch(1), GPUS["a100"])
    assert not alone.fits
    assert chosen.fits


def test_what_fits_comes_first_and_the_fastest_within_a_percent():
    ranked = rank_layouts(PYTHIA["2.8b"], batch(8), 8, GPUS["a100"])
    fits = [candidate.fits for candidate in ranked]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    fastest = min(candidate.step_seconds for candidate in ranked if candidate.fits)
    assert ranked[0].step_seconds < 1.01 * fastest


def test_where_nothing_fits_the_smallest_comes_first():
    huge = replace(SEVEN_BILLION, hidden_size=16384, intermediate_size=65536)
    ranked = rank_layouts(huge, batch(1), 1, H200)
    assert not any(candidate.fits for candidate in ranked)
    assert ranked[0].total_memory == min(candidate.total_memory for candidate in ranked)


def test_leaving_a_node_costs_the_network():
    """The bytes of an all-reduce hardly grow from 8 to 16 GPUs, their way gets 9 times slower."""
    inside = estimate(PYTHIA["410m"], batch(8), H200).seconds["data"]
    across = estimate(PYTHIA["410m"], batch(16), H200).seconds["data"]
    assert across / inside == pytest.approx(9 * (15 / 16) / (7 / 8), rel=1e-3)


def test_a_pipeline_idles_for_its_bubble():
    layout = Layout(pipeline=4, accumulation=8)
    seconds = estimate(PYTHIA["410m"], layout, H200).seconds
    assert seconds["bubble"] == pytest.approx(3 / 8 * seconds["arithmetic"])


def configuration(**changes) -> SimpleNamespace:
    keys = {"tensor": 1, "pipeline": 1, "global_batch_size": 64, "micro_batch_size": 4} | changes
    return SimpleNamespace(
        model=PYTHIA["70m"],
        data=SimpleNamespace(sequence_length=128),
        l2e_settings=SimpleNamespace(layers="mid2"),
        parallel=SimpleNamespace(
            tensor=keys["tensor"],
            pipeline=keys["pipeline"],
            sequence=False,
            activation_checkpointing=False,
        ),
        train=SimpleNamespace(
            global_batch_size=keys["global_batch_size"],
            micro_batch_size=keys["micro_batch_size"],
            dtype="bf16",
        ),
        zero_stage=1,
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
        rank_layouts(PYTHIA["70m"], Layout(micro_batch_size=1), 7, H200)
