"""Time that is not training's does not count, also where the device is behind the host."""

import time
from types import SimpleNamespace

from launch.training.recorder import Recorder


def test_a_pause_waits_for_the_device_on_both_sides(monkeypatch):
    """Steps under way when it begins are training; what it leaves under way is its own."""
    now, queued = [100.0], [5.0]  # seconds of work that the device has still to do

    def wait():
        now[0] += queued[0]
        queued[0] = 0.0

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    recorder = Recorder.__new__(Recorder)
    recorder.engine, recorder.since = SimpleNamespace(wait=wait), 100.0
    with recorder.paused():
        now[0] += 1.0  # the host asks for a validation that takes the device 3 s
        queued[0] = 3.0
    assert now[0] - recorder.since == 5.0
