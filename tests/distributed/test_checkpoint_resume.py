"""Stopping and going on is as if nothing had happened, bit for bit."""

import pytest

from launch import checkpoint
from tests.distributed.checkpointing import (
    differences,
    everything,
    folder_of,
    make_config,
    running,
    train,
)
from tests.distributed.processes import run_on_processes

BEFORE, AFTER = 4, 20


def stop_and_go_on(folder: str, settings: list[dict]) -> list[dict]:
    """For each setting: train, save, train on; then load into a fresh engine and train on."""
    outcome = []
    for number, keys in enumerate(settings):
        config = make_config(**keys)
        with running(config) as engine:
            train(engine, 0, BEFORE)
            saved = checkpoint.save(
                engine, folder_of(f"{folder}/{number}"), {"step": BEFORE, "tokens": 7}
            )
            before = everything(engine)
            losses = train(engine, BEFORE, AFTER)
            after = everything(engine)
        # Another seed: whatever is not loaded shows.
        with running(make_config(**keys, train={**config.train.model_dump(), "seed": 5})) as engine:
            state = checkpoint.load(engine, saved)
            outcome.append(
                {
                    "state": (state["step"], state["tokens"]),
                    "loaded": differences(before, everything(engine)),
                    "losses": (losses, train(engine, BEFORE, AFTER)),
                    "after": differences(after, everything(engine)),
                }
            )
    return outcome


SETTINGS = {
    "zero-0": {"zero": 0, "micro": 2},
    "zero-1": {"zero": 1, "micro": 2},
    "zero-2": {"zero": 2, "micro": 2},
    "zero-3": {"zero": 3, "micro": 2},
    "zero-1 bf16": {"zero": 1, "dtype": "bf16"},
    "zero-2 bf16": {"zero": 2, "dtype": "bf16", "recompute": True},
    "zero-3 bf16": {"zero": 3, "dtype": "bf16"},
    "tensor": {"tensor": 2, "zero": 1},
    "tensor zero-3 bf16": {"tensor": 2, "zero": 3, "dtype": "bf16", "recompute": True},
    "pipeline": {"pipeline": 2, "recompute": True},
    "pipeline bf16": {"pipeline": 2, "dtype": "bf16"},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[list[dict]]:
    """By rank, then by setting: two processes run them all, since starting costs most."""
    folder = tmp_path_factory.mktemp("resume")
    return run_on_processes(stop_and_go_on, 2, folder, str(folder), list(SETTINGS.values()))


@pytest.mark.parametrize("setting", SETTINGS)
def test_resuming_is_exact(outcomes, setting):
    for ranks in outcomes:
        outcome = ranks[list(SETTINGS).index(setting)]
        assert outcome["state"] == (BEFORE, 7)
        assert outcome["loaded"] == []
        uninterrupted, resumed = outcome["losses"]
        assert resumed == uninterrupted
        assert len(set(resumed)) == AFTER  # it does train
        assert outcome["after"] == []
