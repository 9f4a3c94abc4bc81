"""What a process makes of signals; whole runs get some in `tests/launch/test_faults.py`."""

import signal

import pytest

from launch.engine import signals
from launch.engine.signals import StopRequest


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which the process would have left."""
    statuses: list[int] = []
    monkeypatch.setattr(signals, "leave", lambda status, _: statuses.append(status))
    return statuses


def test_a_second_signal_leaves_and_the_kernels_reminder_does_not(left: list[int]) -> None:
    """Past its limit of processor time a process is told so every second."""
    request = StopRequest()
    request.nothing_to_lose = False
    for _ in range(3):
        request.receive(signal.SIGXCPU)
    assert (request.number, left) == (signal.SIGXCPU, [])
    request.receive(signal.SIGTERM)
    assert left == [128 + signal.SIGTERM]
