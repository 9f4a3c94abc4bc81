"""The meters against times and steps that are known."""

import json
import time

import pytest
import torch

from launch.runtime.meters import Profiler, Stopwatch, parse_steps, peak_memory

CPU = torch.device("cpu")


def test_the_stopwatch_adds_up_parts_and_starts_anew(monkeypatch):
    moments = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    stopwatch = Stopwatch(CPU)
    for part in ("forward", "backward", "forward"):
        with stopwatch.part(part):
            pass
    assert stopwatch.take() == {"forward": 1.5, "backward": 2.0}
    assert stopwatch.take() == {}


@pytest.mark.parametrize(
    ("text", "steps"), [(None, []), ("5", [5]), ("5-7", [5, 6, 7]), ("1-1", [1])]
)
def test_steps_to_profile(text, steps):
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["", "0", "a", "7-5", "3-", "-3", "1-x"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="give one as 5 or several as 5-7"):
        parse_steps(text)


def test_the_trace_holds_the_chosen_steps_alone(tmp_path):
    profiler = Profiler(range(2, 4), tmp_path / "profile", rank=3)
    for number, operation in enumerate((torch.cos, torch.sin, torch.exp, torch.tan), start=1):
        with profiler.step(number):
            operation(torch.ones(2))
    trace = json.loads((tmp_path / "profile" / "trace_rank_3.json").read_text())
    recorded = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::sin", "aten::exp"} <= recorded
    assert not {"aten::cos", "aten::tan"} & recorded


def test_nothing_is_recorded_unasked(tmp_path):
    profiler = Profiler(parse_steps(None), tmp_path / "profile", rank=0)
    with profiler.step(1):
        pass
    assert not (tmp_path / "profile").exists()


def test_peak_memory_covers_what_is_held_and_never_falls():
    held = torch.ones(2**25)
    peak = peak_memory(CPU)
    assert peak > held.nbytes
    del held
    assert peak_memory(CPU) >= peak
