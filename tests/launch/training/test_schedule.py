"""The learning rate against the published formula, written out."""

import math

import pytest

from configs.schema import Config
from launch.training.schedule import learning_rate


def pythia(**schedule: object) -> Config:
    return Config.model_validate(
        {
            "model": {"preset": "70m"},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": schedule,
            "train": {"steps": 143000},
        }
    )


@pytest.mark.parametrize("step", [0, 1, 700, 1430, 1431, 14300, 100_000, 115_000, 142_999])
def test_pythias_schedule(step: int) -> None:
    if step <= 1430:
        expected = 1e-3 * step / 1430
    else:
        expected = max(1e-4, 1e-3 / 2 * (math.cos(math.pi * (step - 1430) / 143000) + 1))
    assert learning_rate(pythia(), step) == pytest.approx(expected, rel=1e-12)


def test_pythias_schedule_is_flat_near_its_end() -> None:
    # 0.1 = (cos(x) + 1) / 2 at x = 2.498: step 1430 + 143000 * 2.498 / pi, about 115,000.
    flat = [step for step in range(143000) if learning_rate(pythia(), step) == 1e-4]
    assert 115_000 < next(s for s in flat if s > 1430) < 115_300


def test_todays_schedule_ends_at_the_floor_and_starts_like_pythias() -> None:
    today = pythia(type="neox")
    assert learning_rate(today, 143000) == pytest.approx(1e-4)
    for step in range(0, 14300, 100):
        old = learning_rate(pythia(), step)
        assert learning_rate(today, step) == pytest.approx(old, rel=2e-3)


def test_constant_after_warm_up() -> None:
    config = pythia(type="constant", warmup_steps=10)
    assert [learning_rate(config, s) for s in (0, 5, 10, 1000)] == [0, 5e-4, 1e-3, 1e-3]


def test_no_warm_up() -> None:
    assert learning_rate(pythia(type="constant", warmup_steps=0), 0) == 1e-3
