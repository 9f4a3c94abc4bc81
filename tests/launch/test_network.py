"""A run on two hosts whose link dies, or comes back: real processes in network namespaces."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import fleet
from tests.launch.fleet import ranks, wait_for_end, wait_for_step, words
from tests.launch.hosts import Hosts, two_hosts, why_none

pytestmark = pytest.mark.cluster


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := why_none():
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


def test_a_dead_link_ends_the_run_on_both_sides(hosts: Hosts, tmp_path: Path) -> None:
    """Each side names the other; nothing is left running, and the run goes on afterwards."""
    config, run = fleet.write_config(tmp_path), tmp_path / "run"
    few = words({"parallel.step_timeout": 8})
    with ranks(2, config, run, *few, logs=tmp_path / "a", hosts=hosts) as members:
        wait_for_step(run, 6, *members)
        hosts.link(up=False)
        wait_for_end(members, 60)
        for rank, member in enumerate(members):
            other = 1 - rank
            assert member.process.returncode == 1, member.output()
            last = member.last_line()
            assert f"rank {other} on {hosts.names[other]}" in last, member.output()
            assert "gave no sign of life" in last
            assert f"step_{fleet.newest(run):07d}" in last
    hosts.link(up=True)
    before, again = fleet.newest(run), [*few, "--resume", "auto"]
    with ranks(2, config, run, *again, logs=tmp_path / "b", hosts=hosts) as members:
        wait_for_step(run, before + 3, *members)


def test_a_link_that_comes_back_costs_nothing(hosts: Hosts, tmp_path: Path) -> None:
    config, run = fleet.write_config(tmp_path, train={"steps": 200}), tmp_path / "run"
    with ranks(2, config, run, logs=tmp_path, hosts=hosts) as members:
        wait_for_step(run, 6, *members)
        hosts.link(up=False)
        with pytest.raises(AssertionError, match="still running"):
            wait_for_end(members, 2)
        hosts.link(up=True)
        wait_for_end(members, 120)
        assert [member.process.returncode for member in members] == [0, 0], members[0].output()
    assert sorted(fleet.losses(run)) == list(range(1, 201))
