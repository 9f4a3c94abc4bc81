"""Ranks that find each other: real stores, one thread a rank."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from launch.engine import joining
from launch.engine.joining import Joined, join
from launch.engine.processes import ALONE, find
from tests.launch.running import free_port


def ranks(numbers: list[int], world_size: int, seconds: float = 30, **variables: str):
    """What each of these ranks gets (or is told), by its position, and every line said."""
    port, said = str(free_port()), []

    def one(number: int) -> Joined | str:
        place = {"RANK": str(number), "WORLD_SIZE": str(world_size)}
        process = find(place | {"MASTER_ADDR": "localhost", "MASTER_PORT": port} | variables)
        try:
            return join(process, timedelta(seconds=seconds), said.append)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers)), said


def test_local_ranks_come_from_the_hosts_names() -> None:
    """Four variables are enough; both hosts here are one, so the places are 0, 1, 2."""
    joined, said = ranks([2, 0, 1], 3)
    assert [(one.process.local_rank, one.process.local_size) for one in joined] == [
        (2, 3),
        (0, 3),
        (1, 3),
    ]
    assert said == []
    process = joined[0].process
    placed = joining.place_within_host(process, ["a", "b", "b"])
    assert (placed.local_rank, placed.local_size) == (2, 3)  # what is known stays


def test_who_is_awaited_is_said_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FIRST_NOTICE", 0.3)
    errors, said = ranks([0, 1, 3], 6, seconds=1)
    line = f"here are ranks 0-1, 3 (on {joining.socket.gethostname()}), awaited are ranks 2, 4-5"
    assert len(said) == 1, "one rank speaks"
    assert line in said[0]
    assert all(line in error and "parallel.join_timeout" in error for error in errors)
    errors, said = ranks([1], 2, seconds=1)
    assert "waits for the first rank at localhost" in said[0]
    assert "refused" in errors[0]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n" + b"no" * 50])
def test_another_program_at_the_first_ranks_port(answer, monkeypatch) -> None:
    """One that says nothing, and one that says something else; torch would wait without end."""
    monkeypatch.setattr(joining, "FIRST_NOTICE", 0.3)
    other, connections = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(other.accept()[0])
                connections[-1].sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setattr(
        "tests.launch.engine.test_joining.free_port", lambda: other.getsockname()[1]
    )
    errors, said = ranks([0, 1], 2, seconds=2)
    other.close()
    assert "cannot listen at port" in errors[0]
    assert "what listens there does not answer as a rank does" in said[0]
    assert "parallel.join_timeout" in errors[1]


def test_the_first_rank_need_not_be_reached_by_its_own_name() -> None:
    """A service of Kubernetes, for example, that leads to it from other pods alone."""
    process = find({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x.invalid", "MASTER_PORT": "1"})
    port = free_port()
    first = joining.connect(replace(process, port=port), joining.Notices(5, print))
    other = replace(process, rank=1, address="127.0.0.1", port=port)
    joining.connect(other, joining.Notices(5, print)).set("hello", "there")
    assert first.get("hello") == b"there"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_interface_that_has_an_address(address) -> None:
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    assert joining.interface_of(address) == "lo"


def test_a_rank_that_is_there_twice() -> None:
    errors, _ = ranks([0, 1, 1], 3, seconds=2)
    assert all("rank 1 of 3 is there twice" in str(error) for error in errors)


def test_a_host_whose_name_leads_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interface that reaches the other hosts is named to gloo; none is refused."""
    process = find({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    told = [{"host": "a", "address": "127.0.1.1"}, {"host": "b", "address": "10.9.8.7"}]
    reached = {"a": "127.0.1.1", "10.9.8.7": "10.9.8.6"}
    monkeypatch.setattr(joining, "source_address", lambda host, port: reached.get(host))
    monkeypatch.setattr(joining, "interface_of", {"10.9.8.6": "fabric0"}.get)
    assert joining.interface(process, told) == {"GLOO_SOCKET_IFNAME": "fabric0"}
    reached["10.9.8.7"] = "127.0.0.1"
    with pytest.raises(ValueError, match="Set GLOO_SOCKET_IFNAME"):
        joining.interface(process, told)
    reached["a"] = "10.9.8.6"
    assert joining.interface(process, told) == {}


def test_all_hosts_wait_for_the_slowest_ones_data():
    """Of two hosts with two ranks each, one rank of each works first, and nobody goes on early."""
    store, hosts = dist.HashStore(), ["a", "a", "b", "b"]
    release, order = threading.Event(), []

    def rank(number: int) -> str:
        process = replace(ALONE, rank=number, world_size=4, local_rank=number % 2, local_size=2)

        def work() -> str:
            if number == 2:
                assert release.wait(30)
            order.append(number)
            return f"path of {number}"

        path = joining.first_of_host(Joined(process, store, hosts, {}), "data", work)
        assert {0, 2} <= set(order)
        return path

    with ThreadPoolExecutor(4) as pool:
        paths = [pool.submit(rank, number) for number in range(4)]
        while order != [0]:
            time.sleep(0.01)
        assert not any(path.done() for path in paths)
        release.set()
        assert [path.result(30) for path in paths] == [f"path of {n}" for n in range(4)]
    assert order[:2] == [0, 2]
    assert sorted(order[2:]) == [1, 3]
