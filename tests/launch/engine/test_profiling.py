"""The meters against times and steps that are known."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import DeviceType

from launch.engine.profiling import Profiler, Stopwatch, communication, parse_steps, peak_memory
from tests.distributed.processes import run_on_processes

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


def test_communication_is_told_apart_from_what_hides_it():
    """Exchanges from 0 to 4 and 6 to 9 s, computation from 3 to 7 s: 7 s, 5 of them exposed."""
    events = [
        event("gloo:all_reduce", 0, 4),
        event("gloo:all_reduce", 1, 3),
        event("gloo:all_gather", 6, 9),
        event("aten::mm", 3, 6),
        event("aten::mul", 4, 7),
        event("forward", 0, 10),
    ]
    found = communication(events, steps=1)
    assert found == pytest.approx({"communication": 7.0, "exposed": 5.0})
    assert communication(events, steps=2)["communication"] == pytest.approx(3.5)
    assert communication(events[3:], steps=1) == {"communication": 0.0, "exposed": 0.0}
    # Where there is a GPU, what the host does meanwhile hides nothing.
    on_gpu = [event("ncclDevKernel_AllReduce", 0, 2, DeviceType.CUDA), *events]
    assert communication(on_gpu, 1) == {"communication": 2.0, "exposed": 2.0}


def event(name, begin, end, device=DeviceType.CPU):
    span = SimpleNamespace(start=begin * 1e6, end=end * 1e6)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, is_user_annotation=name == "forward"
    )


def exchange_and_compute(folder: str) -> dict:
    rank = torch.distributed.get_rank()
    profiler = Profiler(range(1, 2), Path(folder), rank)
    with profiler.step(1):
        torch.distributed.all_reduce(torch.ones(2**20))
    return json.loads((Path(folder) / f"communication_rank_{rank}.json").read_text())


def test_exchanges_of_two_ranks_are_found(tmp_path):
    for found in run_on_processes(exchange_and_compute, 2, tmp_path, str(tmp_path)):
        assert found["steps"] == [1]
        assert 0 < found["exposed"] <= found["communication"] < 60


def test_steps_that_will_not_run_are_refused(tmp_path):
    Profiler(range(0), tmp_path, rank=0).expect(range(1, 9))
    Profiler(range(6, 9), tmp_path, rank=0).expect(range(6, 9))
    for steps in (range(5, 7), range(8, 10)):
        with pytest.raises(ValueError, match=r"steps 6 to 8 will run"):
            Profiler(steps, tmp_path, rank=0).expect(range(6, 9))


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
