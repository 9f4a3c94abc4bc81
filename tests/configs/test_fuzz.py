"""A small form of `make fuzz`: wrong configurations end in a plan or a report, and plans run."""

from pathlib import Path

from tests.configs.fuzz import run_one_step, try_configurations


def test_wrong_configurations_are_reported_and_accepted_ones_run(tmp_path: Path) -> None:
    told, accepted = try_configurations(tmp_path, 400, seed=1)
    assert set(told) == {"plan", "report"}
    assert told["report"] > 300
    assert [run_one_step(path) for path in accepted[:2]] == [None, None]
