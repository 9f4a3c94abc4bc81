"""The small form of bench/soak.py: ten faults."""

from pathlib import Path

import pytest

from bench import soak


@pytest.mark.cluster
def test_ten_faults_leave_the_numbers_as_they_are(tmp_path: Path) -> None:
    found = soak.soak(tmp_path, steps=300, faults=10, processes=2, seed=1)
    assert sum(found["faults"].values()) >= 10
    assert found["lost_checkpoints"] == 0
    assert found["differing_steps"] == []
