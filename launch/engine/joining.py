"""The ranks of a run find each other, and say whom they wait for."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from l2e.problems import first_line
from launch.engine.processes import Process

FIRST_NOTICE, NEXT_NOTICES = 20.0, 60.0  # seconds
LONGEST_PAUSE = 1.0  # between two looks, seconds
ANSWER = 0.5  # for one of a store, before another look at the clock, seconds
LOOPBACK = "127.0.0.1"
EVERYONE = "everyone"
T = TypeVar("T")
say_now = partial(print, flush=True)


@dataclass(frozen=True)
class Joined:
    """This process among ranks that have met."""

    process: Process  # with its place within its host
    store: dist.Store  # of this start of the run alone
    hosts: list[str]  # by rank
    interface: dict[str, str]  # gloo's variable, where it must not choose by itself


def join(process: Process, timeout: timedelta, say: Callable[[str], None] = say_now) -> Joined:
    """Meet the other ranks; after 20 s and then every minute `say` who is awaited.

    Raises:
        ValueError: some rank did not come within `timeout`, or came twice.
    """
    if process.world_size == 1:
        return Joined(process, dist.HashStore(), [socket.gethostname()], {})
    notices = Notices(timeout.total_seconds(), say)
    store = dist.PrefixStore(prefix(), connect(process, notices))
    try:
        try:
            announce(process, store)
            ranks = wait_for_everyone(process, store, notices)
        except ValueError as error:
            give_up(process, store, str(error))
            raise
    except RuntimeError as error:  # torch's, of a store that is gone
        raise ValueError(
            f"the first rank at {process.address}:{process.port} left while the ranks were meeting "
            f"({first_line(error)}); its own output says why"
        ) from None
    hosts = [rank["host"] for rank in ranks]
    return Joined(place_within_host(process, hosts), store, hosts, interface(process, ranks))


class Notices:
    """When to say that somebody is still awaited, and when to give up."""

    def __init__(self, limit: float, say: Callable[[str], None]) -> None:
        self.begin = time.monotonic()
        self.limit, self.say = limit, say
        self.next = FIRST_NOTICE

    def pause(self, message: Callable[[], str], speaks: Callable[[], bool], attempt: int) -> None:
        """Wait a moment; say `message` if it is time to and this rank `speaks` for others.

        Raises:
            ValueError: the time is up.
        """
        waited = time.monotonic() - self.begin
        if waited >= self.limit:
            raise ValueError(
                f"not all ranks came within {self.limit:.0f} s (parallel.join_timeout): {message()}"
            )
        if waited >= self.next:
            self.next = waited + NEXT_NOTICES
            if speaks():
                self.say(f"after {waited:.0f} s: {message()}")
        time.sleep(min(LONGEST_PAUSE, 0.02 * 2 ** min(attempt, 10)))


def prefix() -> str:
    """What keys of this start of the run begin with.

    torchrun's agent keeps its store over restarts, and with it the addresses of dead ranks.
    """
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "l2e/" + "/".join(os.environ.get(name, "0") for name in names)


def connect(process: Process, notices: Notices) -> dist.Store:
    """The store at MASTER_ADDR: torchrun's agent's, or the first rank's."""
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if process.rank == 0 and not agents:
        try:
            # It listens at all addresses. MASTER_ADDR may lead here from other hosts alone.
            return dist.TCPStore(
                LOOPBACK, process.port, None, is_master=True, wait_for_workers=False
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"the first rank cannot listen at port {process.port} of {socket.gethostname()} "
                f"({first_line(error)}): set MASTER_PORT to a port that nothing else uses"
            ) from None
    problem = ""

    def message() -> str:
        return (
            f"rank {process.rank} on {socket.gethostname()} waits for the first rank at "
            f"{process.address}:{process.port} ({problem})"
        )

    answer: Future[dist.Store] | None = None
    attempt = 0
    while True:
        try:  # torch's own attempts end in pages of warnings
            if answer is None:
                socket.create_connection((process.address, process.port), timeout=5).close()
                answer = in_thread(
                    partial(dist.TCPStore, process.address, process.port, None, is_master=False)
                )
                problem = "what listens there does not answer as a rank does"
            return answer.result(timeout=ANSWER)
        except (OSError, RuntimeError) as error:  # also that there is no answer yet
            if answer is None or answer.done():
                problem, answer = first_line(error), None
        notices.pause(message, lambda: not process.local_rank, attempt)
        attempt += 1


def in_thread(work: Callable[[], T]) -> Future[T]:
    """What `work` will have done, in a thread that ends with the process at the latest: another
    program may listen at MASTER_PORT, and torch waits for its answer for ever."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()
    return result


def announce(process: Process, store: dist.Store) -> None:
    """Tell the others where this rank is.

    Raises:
        ValueError: the rank is there already.
    """
    here = {"host": socket.gethostname(), "address": own_address(process)}
    if store.add(f"count/{process.rank}", 1) > 1:
        there = store.check([key(process.rank)])
        other = f"on {read(store, process.rank)['host']}" if there else "elsewhere"
        raise ValueError(
            f"rank {process.rank} of {process.world_size} is there twice: on {here['host']} and "
            f"{other}. Each process needs a rank of its own; if this one was restarted, the others "
            "must be, too"
        )
    store.set(key(process.rank), json.dumps(here | {"world_size": process.world_size}))
    store.add("arrived", 1)


def key(rank: int) -> str:
    return f"rank/{rank}"


def read(store: dist.Store, rank: int) -> dict[str, Any]:
    return json.loads(store.get(key(rank)))


def wait_for_everyone(process: Process, store: dist.Store, notices: Notices) -> list[dict]:
    """What each rank tells of itself, when all are there."""

    def here() -> list[int]:
        return [rank for rank in range(process.world_size) if store.check([key(rank)])]

    def message() -> str:
        present = here()
        hosts = sorted({read(store, rank)["host"] for rank in present})
        awaited = set(range(process.world_size)) - set(present)
        return (
            f"here are ranks {ranges(present)} (on {', '.join(hosts)}), awaited are ranks "
            f"{ranges(awaited)} of {process.world_size}"
        )

    attempt = 0
    while not store.check([EVERYONE]):
        if process.rank == 0 and store.add("arrived", 0) >= process.world_size:
            ranks = [read(store, rank) for rank in range(process.world_size)]
            store.set(EVERYONE, json.dumps(ranks))
            break
        notices.pause(message, lambda: here()[:1] == [process.rank], attempt)
        attempt += 1
    ranks = json.loads(store.get(EVERYONE))
    if isinstance(ranks, str):
        raise ValueError(ranks)
    if ranks[0]["world_size"] != process.world_size:
        raise ValueError(
            f"rank {process.rank} counts {process.world_size} ranks and the first rank "
            f"{ranks[0]['world_size']}: give every process the same number"
        )
    return ranks


def give_up(process: Process, store: dist.Store, reason: str) -> None:
    """Tell the ranks that wait why they wait in vain."""
    if not store.check([EVERYONE]):
        store.set(EVERYONE, json.dumps(reason))
    if process.rank == 0:
        time.sleep(2 * LONGEST_PAUSE)  # its store ends with it


def first_of_host(
    joined: Joined, name: str, work: Callable[[], T], say: Callable[[str], None] = say_now
) -> T:
    """`work()`, first by one rank of each host and then by the others, who find it done.

    They begin when all hosts are done, however long that takes, and so does what follows: the
    process group's forming has a limit, and one host's download may take longer than another's.
    """
    if joined.process.local_rank != 0:
        wait_for_hosts(joined, name, say)
        return work()
    result = work()
    joined.store.set(f"{name}/{joined.hosts[joined.process.rank]}", "done")
    wait_for_hosts(joined, name, say)
    return result


def wait_for_hosts(joined: Joined, name: str, say: Callable[[str], None]) -> None:
    """Until every host has set its key; after 20 s and then every minute the first rank tells."""
    notices, attempt = Notices(float("inf"), say), 0

    def awaited() -> list[str]:
        hosts = sorted(set(joined.hosts))
        return [host for host in hosts if not joined.store.check([f"{name}/{host}"])]

    while awaited():
        message = partial("waiting for {} on {}".format, name, ", ".join(awaited()))
        notices.pause(message, lambda: joined.process.is_first, attempt)
        attempt += 1


def is_first_to_tell(joined: Joined, what: str) -> bool:
    """Whether no other rank of this host has told of `what` yet, as far as this one can know."""
    try:
        return joined.store.add(f"told/{what}/{joined.hosts[joined.process.rank]}", 1) == 1
    except RuntimeError:  # torch's, of a store that is gone
        return True


def ranges(numbers: Iterable[int]) -> str:
    """0-3, 5."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][-1] == n - 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)


def place_within_host(process: Process, hosts: list[str]) -> Process:
    """The process with its local rank: how many lower ranks have its host's name."""
    if process.local_rank is not None and process.local_size is not None:
        return process
    own = hosts[process.rank]
    return replace(
        process,
        local_rank=hosts[: process.rank].count(own)
        if process.local_rank is None
        else process.local_rank,
        local_size=hosts.count(own),
    )


def own_address(process: Process) -> str:
    """The address by which this host reaches the first rank's."""
    return source_address(process.address, process.port) or ""


def source_address(host: str, port: int) -> str | None:
    """The address that packets from here to `host` would carry; none is sent."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError:
        return None


def interface(process: Process, ranks: list[dict[str, Any]]) -> dict[str, str]:
    """gloo's interface, if hosts are several and this one's name leads to itself.

    gloo listens where the host's name points to, which on many systems is 127.0.1.1.
    """
    own = ranks[process.rank]
    others = [rank["address"] for rank in ranks if rank["host"] != own["host"]]
    named = source_address(own["host"], 1)
    if not others or "GLOO_SOCKET_IFNAME" in os.environ or (named and not is_loopback(named)):
        return {}
    candidates = [own["address"], *(source_address(other, 1) for other in others if other)]
    for address in candidates:
        if address and not is_loopback(address) and (name := interface_of(address)):
            return {"GLOO_SOCKET_IFNAME": name}
    raise ValueError(
        f"{own['host']} has no address by which other hosts reach it: its name leads to "
        f"{named or 'nothing'}; its interfaces are "
        f"{', '.join(name for _, name in socket.if_nameindex())}. Set GLOO_SOCKET_IFNAME (and "
        "NCCL_SOCKET_IFNAME) to the one between the hosts"
    )


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("", "::1")


def interface_of(address: str) -> str | None:
    """The network interface that has this address."""
    if ":" in address:
        plain = ipaddress.IPv6Address(address.partition("%")[0]).packed.hex()
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
        return next((line.split()[-1] for line in lines if line.startswith(plain)), None)
    get_address = 0x8915  # SIOCGIFADDR of Linux
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), get_address, request)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
