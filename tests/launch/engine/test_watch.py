"""What one rank makes of the others' end; whole runs are in `tests/launch/test_faults.py`."""

import signal
import socket
import subprocess
import sys

import torch.distributed as dist

from launch.engine import watch
from launch.engine.joining import Joined
from launch.engine.processes import ALONE
from launch.engine.signals import StopRequest
from launch.engine.watch import Hub, Watch, process_of


def test_the_first_rank_is_reached_by_addresses_of_both_kinds() -> None:
    hub = Hub(["here"], 5)
    port = hub.listener.getsockname()[1]
    for address in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
        socket.create_connection((address, port), timeout=5).close()
    hub.ending.set()
    hub.thread.join()


def test_a_silent_rank_is_killed_and_nobody_else(tmp_path, monkeypatch) -> None:
    """Another container's processes may have the same numbers, on a host of the same name."""
    left = []
    monkeypatch.setattr(watch, "leave", lambda status, message: left.append((status, message)))
    monkeypatch.setattr(watch, "BEAT", 0.01)
    joined = Joined(ALONE, dist.HashStore(), ["here"], {})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        host, pid, born = process_of(other.pid)
        with Watch(joined, StopRequest(), 5, tmp_path) as one:
            elsewhere = [[host, pid, born + 1], [f"{host}2", pid, born], [host, 2**22, None]]
            one.obey({"verdict": "rank 1 is silent", "stacks": False, "kill": elsewhere})
            assert other.poll() is None
            one.obey({"verdict": "rank 1 is silent", "stacks": False, "kill": [[host, pid, born]]})
            assert other.wait(10) == -signal.SIGKILL
    assert left[0][0] == 1
    assert left[0][1].startswith("the run ends: rank 1 is silent; there is no checkpoint")
