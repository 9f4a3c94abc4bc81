"""The small forms of bench/soak.py and bench/save_kills.py: ten faults, and six kills."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from bench import save_kills, soak
from tests.launch.hosts import two_hosts, why_none


@pytest.mark.cluster
def test_ten_faults_leave_the_numbers_as_they_are(tmp_path: Path) -> None:
    with nullcontext() if why_none() else two_hosts() as hosts:
        found = soak.soak(tmp_path, 600, faults=10, processes=2, seed=1, hosts=hosts)
    assert sum(found["faults"].values()) >= 10
    assert found["lost_checkpoints"] == 0
    assert found["differing_steps"] == []


@pytest.mark.cluster
def test_no_kill_in_a_save_costs_a_checkpoint(tmp_path: Path) -> None:
    found = save_kills.kill_saves(tmp_path, kills=6, seed=1)
    assert found["killed_in_a_save"] == 6
    assert found["lost"] == found["damaged"] == 0
