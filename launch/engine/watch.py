"""Ranks that watch each other: who died, who is stuck, and whether the launcher lives.

A collective waits for a lost rank for half an hour, or for ever. Beside the collectives each rank
keeps a connection to the first one and says once a second that it lives. The kernel closes the
connection of a process that dies; a process that is stopped, or behind a dead link, falls silent.
What has happened is told to all, and every rank ends by itself: its main thread may wait inside a
collective that nothing interrupts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l2e.mapped import explain_bus_errors
from l2e.problems import first_line
from launch.engine.joining import Joined, ranges
from launch.engine.processes import MPI
from launch.engine.signals import StopRequest, leave, status_of

BEAT = 1.0  # seconds between two signs of life
SILENT = 5.0  # without one for so long, a rank counts as silent
GRACE = 5.0  # for the main thread to leave by itself, seconds
LONGER = 4  # times parallel.step_timeout: saves, evaluations, the first step


class Lines:
    """JSON lines over a socket that never blocks for long."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rest = connection, b""
        self.lock = threading.Lock()
        connection.settimeout(BEAT)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, if the other side still takes any."""
        with self.lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None when the other side is gone."""
        try:
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # a stranger: whatever looks for open ports
            return None
        return messages if all(isinstance(one, dict) for one in messages) else None


class Member:
    """A rank, as the hub knows it."""

    def __init__(self, lines: Lines, hello: dict[str, Any], now: float) -> None:
        self.lines, self.process = lines, hello["process"]
        self.step, self.heard, self.finished = 0, now, False


class Hub:
    """The first rank's thread: hears all ranks and tells all of them what happened to one."""

    def __init__(self, hosts: list[str], timeout: float) -> None:
        self.hosts, self.timeout = hosts, timeout
        self.token = secrets.token_hex(16)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.listener = socket.create_server(
            ("", 0), family=family, backlog=len(hosts), dualstack_ipv6=both
        )
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.members: dict[int, Member] = {}
        self.start = self.last_round = time.monotonic()
        self.judged = self.stopping = False
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.work, name="hub", daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Until everyone has finished."""
        while not (self.ending.is_set() and all(m.finished for m in self.members.values())):
            for ready, _ in self.selector.select(timeout=BEAT / 2):
                if ready.data is not None:
                    self.hear(ready.data)
                elif ready.fileobj is self.listener:
                    self.welcome()
            self.look_around()
        self.tell_all({"end": True})

    def welcome(self) -> None:
        """A new connection: a rank of this run, or a stranger."""
        connection, _ = self.listener.accept()
        lines = Lines(connection)
        hello = (lines.receive() or [{}])[0]
        if hello.get("token") != self.token:
            connection.close()
            return
        rank = hello["rank"]
        self.members[rank] = Member(lines, hello, time.monotonic())
        self.selector.register(connection, selectors.EVENT_READ, rank)

    def hear(self, rank: int) -> None:
        """A rank's messages, or its end."""
        member = self.members[rank]
        messages = member.lines.receive()
        if messages is None:
            self.selector.unregister(member.lines.connection)
            if not member.finished:
                member.finished = True
                self.judge(f"{self.name(rank)} died in step {member.step}")
            return
        member.heard = time.monotonic()
        for message in messages:
            member.step = message.get("step", member.step)
            member.finished |= "done" in message or "left" in message
            if "left" in message or ("stop" in message and not self.stopping):
                self.stopping = True
                self.tell_all(message)
            if "failed" in message:
                member.finished = True
                self.judge(f"{self.name(rank)} failed in step {member.step}: {message['failed']}")
            if "stuck" in message:
                self.judge_stuck(rank, message["stuck"])

    def judge_stuck(self, rank: int, what: str) -> None:
        """A rank is not getting on: because of a silent one, if there is any."""
        if silent := self.silent(SILENT):
            self.judge_silent(silent)
        else:
            self.judge(f"{self.name(rank)} is stuck: {what}", stacks=True)

    def judge_silent(self, silent: list[int]) -> None:
        """Ranks that say nothing: stopped, behind a dead link, or their host is down."""
        names = ", ".join(self.name(rank) for rank in silent)
        members = [self.members[rank] for rank in silent if rank in self.members]
        step = min((member.step for member in members), default=0)
        seconds = time.monotonic() - min((m.heard for m in members), default=self.start)
        self.judge(
            f"{names} gave no sign of life for {seconds:.0f} s, in step {step}",
            stacks=True,
            kill=[member.process for member in members],
        )

    def look_around(self) -> None:
        """Once a beat: who is silent, and that the hub lives."""
        now = time.monotonic()
        gap = now - self.last_round
        if gap < BEAT:
            return
        if gap > SILENT:  # this process itself was stopped for a while
            for member in self.members.values():
                member.heard = now
            self.start += gap
        self.last_round = now
        self.tell_all({"silent": self.silent(SILENT)})
        if silent := self.silent(self.timeout):
            self.judge_silent(silent)

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have said nothing for so long."""
        now = time.monotonic()
        heard = {rank: m.heard for rank, m in self.members.items() if not m.finished}
        late = {r: self.start for r in range(len(self.hosts)) if r not in self.members}
        return sorted(rank for rank, when in (heard | late).items() if now - when > seconds)

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def judge(self, text: str, stacks: bool = False, kill: list[Any] | None = None) -> None:
        """Tell everyone why the run ends; the first reason is the cause, others follow from it."""
        if not self.judged:
            self.judged = True
            self.tell_all({"verdict": text, "stacks": stacks, "kill": kill or []})

    def tell_all(self, message: dict[str, Any]) -> None:
        for member in self.members.values():
            member.lines.send(message)


class Watch:
    """This rank's part: signs of life to the hub, and leaving when the run cannot go on."""

    def __init__(self, joined: Joined, request: StopRequest, timeout: float, folder: Path) -> None:
        """All ranks build it together. timeout: parallel.step_timeout, seconds."""
        self.joined, self.request, self.timeout, self.folder = joined, request, timeout, folder
        self.rank, self.host = joined.process.rank, socket.gethostname()
        self.step, self.doing, self.deadline = 0, "starting", float("inf")
        self.hub: Hub | None = None
        self.lines: Lines | None = None
        self.verdict: str | None = None
        self.closed = self.reported = False
        self.silent: list[int] = []
        self.heard = self.last_beat = time.monotonic()
        self.launchers = find_launchers(joined.process.launcher)
        if joined.process.world_size > 1:
            self.connect()
        self.request.tell.append(self.pass_on)
        explain_bus_errors(lambda: f"; {self.newest_checkpoint()}")
        self.thread = threading.Thread(target=self.work, name="watch", daemon=True)
        self.thread.start()

    def connect(self) -> None:
        """Find the hub, whose address the first rank has put into the store."""
        store, process = self.joined.store, self.joined.process
        if self.rank == 0:
            self.hub = Hub(self.joined.hosts, self.timeout)
            port = self.hub.listener.getsockname()[1]
            store.set("hub", json.dumps([port, self.hub.token, this_process()]))
        port, token, self.hub_process = json.loads(store.get("hub"))
        places = [process.address, self.joined.hosts[0]]
        if self.joined.hosts[0] == self.host:
            places.insert(0, "localhost")
        problem: Exception | None = None
        for place in places:
            try:
                connection = socket.create_connection((place, port), timeout=10)
                break
            except OSError as error:
                problem = error
        else:
            raise ValueError(
                f"rank {self.rank} on {self.host} cannot reach the first rank at "
                f"{' or '.join(places)}, port {port}: {first_line(problem or OSError())}"
            )
        self.lines = Lines(connection)
        self.lines.send({"token": token, "rank": self.rank, "process": this_process()})

    def expect(self, step: int, doing: str, longer: bool = False, limit: bool = True) -> None:
        """The main thread begins something: a step, or what may take `longer` or has no limit."""
        self.step, self.doing = step, doing
        seconds = self.timeout * (LONGER if longer else 1) if limit else float("inf")
        self.deadline = time.monotonic() + seconds

    @contextlib.contextmanager
    def nothing_to_lose(self, step: int, doing: str) -> Iterator[None]:
        """What may take hours, after `step` was saved: a signal ends the process at once."""
        self.expect(step, doing, limit=False)
        self.request.nothing_to_lose = True
        if self.request.number is not None:
            self.request.ask(self.request.number, signal.Signals(self.request.number).name)
        yield
        self.request.nothing_to_lose = False

    def pass_on(self, number: int, at_once: bool) -> None:
        """Tell the others that this rank was asked to leave, or leaves now."""
        if self.lines is not None:
            self.lines.send({"left" if at_once else "stop": number})

    def work(self) -> None:
        """The thread: once a beat, or when the hub says something."""
        while not self.closed:
            if self.lines is None:
                time.sleep(BEAT)
            else:
                self.listen()
            self.check()

    def listen(self) -> None:
        """What the hub says, within one beat."""
        assert self.lines is not None
        messages = self.lines.receive()
        if messages is None:
            if not self.closed:
                # The hub's last word may be a signal's, which takes a moment to work.
                time.sleep(BEAT)
                self.end(f"rank 0 on {self.joined.hosts[0]} died in step {self.step}")
            return
        if messages:
            self.heard = time.monotonic()
        for message in messages:
            self.silent = message.get("silent", self.silent)
            if "end" in message:
                self.closed = True
            if "left" in message:
                leave(
                    status_of(message["left"]),
                    f"stopped by a signal to another rank; {self.newest_checkpoint()}",
                )
            if "stop" in message and self.request.number is None:
                self.request.ask(message["stop"], "a signal to another rank")
            if "verdict" in message:
                self.obey(message)

    def obey(self, message: dict[str, Any]) -> None:
        """The run ends: this rank shows where it stands, if asked, and leaves."""
        self.verdict = message["verdict"]
        if message["stacks"]:
            self.show_stacks()
        for process in message["kill"]:
            if process != this_process() and process == process_of(process[1]):
                with contextlib.suppress(OSError):  # stopped: it would never leave by itself
                    os.kill(process[1], signal.SIGKILL)
        if not message["stacks"]:
            time.sleep(GRACE if self.reported else BEAT)
        self.end(self.verdict)

    def end(self, text: str) -> None:
        """Leave with the reason as the last line."""
        if not self.closed:
            leave(1, f"the run ends: {text}; {self.newest_checkpoint()}")

    def newest_checkpoint(self) -> str:
        """What the run goes on from."""
        with contextlib.suppress(OSError):
            latest = (self.folder / "checkpoints" / "latest").read_text().strip()
            return f"the newest checkpoint is {self.folder / 'checkpoints' / latest}"
        return f"there is no checkpoint in {self.folder} yet"

    def show_stacks(self) -> None:
        """Where each thread of this rank stands, to its output and to the run's folder."""
        head = f"rank {self.rank} on {self.host}, in step {self.step} ({self.doing}):"
        print(head, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        with contextlib.suppress(OSError):
            folder = self.folder / "stacks"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank_{self.rank:05d}.txt", "w") as file:
                print(head, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)

    def check(self) -> None:
        """Signs of life; the limits of time; the launcher."""
        now = time.monotonic()
        gap = now - self.last_beat
        if gap < BEAT / 2:
            return
        if gap > SILENT:  # this process itself was stopped for a while
            self.heard = now
            self.deadline += gap
        self.last_beat = now
        if self.lines is not None:
            self.lines.send({"step": self.step})
        if self.request.number is None and any(is_gone() for is_gone in self.launchers):
            self.request.ask(signal.SIGTERM, "the end of its launcher")
        if now > self.deadline:
            self.deadline = now + GRACE + 2 * SILENT  # and then without the hub
            self.report_stuck()
        self.check_hub(now)

    def report_stuck(self) -> None:
        text = f"{self.doing} takes longer than parallel.step_timeout = {self.timeout:.0f} s allows"
        if self.lines is None or self.reported:
            self.show_stacks()
            self.end(f"rank {self.rank} on {self.host} is stuck in step {self.step}: {text}")
            return
        self.reported = True
        self.lines.send({"stuck": text, "step": self.step})

    def check_hub(self, now: float) -> None:
        """Whether the first rank, or any other, is silent."""
        if self.lines is None or self.closed:
            return
        silence = now - self.heard
        hub = f"rank 0 on {self.joined.hosts[0]}"
        if silence > self.timeout:
            text = f"{hub} gave no sign of life for {silence:.0f} s, in step {self.step}"
            self.obey({"verdict": text, "stacks": True, "kill": [self.hub_process]})
        asked = self.request.number is not None and now - self.request.since > SILENT
        if asked and (silence > SILENT or self.silent):
            names = f"ranks {ranges(self.silent)}" if self.silent else hub
            self.end(f"asked to stop, but {names} did not answer, so that nothing could be saved")

    def explain(self, error: BaseException) -> None:
        """The main thread fails by `error`: because of another rank's end, or by itself.

        Does not return if another rank's end is the reason.
        """
        consequence = isinstance(error, RuntimeError) and self.lines is not None
        patience = time.monotonic() + (2 * BEAT if consequence else 0)
        while self.verdict is None and time.monotonic() < patience:
            time.sleep(BEAT / 20)
        if self.verdict is not None and consequence:
            self.end(self.verdict)
        self.reported = True
        if self.lines is not None:
            self.lines.send({"failed": f"{type(error).__name__}: {first_line(error)}"})

    def close(self) -> None:
        """The end that all ranks have reached together."""
        if self.hub is not None:
            self.hub.ending.set()
        if self.lines is not None:
            self.lines.send({"done": True})
        self.closed = True
        if self.hub is not None:
            self.hub.thread.join(timeout=GRACE)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.close()
        else:
            self.explain(error)


def find_launchers(launcher: str) -> list[Callable[[], bool]]:
    """Functions that say whether a launcher of this process is gone.

    A process whose parent dies gets another one. deepspeed starts a launcher on each node, which
    outlives it. A shell is no launcher: `nohup ... &` goes on when its terminal is closed.
    """
    if launcher not in ("torchrun", "deepspeed", *MPI, "srun"):
        return []
    parent = os.getppid()
    found: list[Callable[[], bool]] = [lambda: os.getppid() != parent]
    above = parent_of(parent)
    if launcher == "deepspeed" and above and b"deepspeed" in command_of(above):
        found.append(lambda: parent_of(parent) != above)
    return found


def this_process() -> list[Any]:
    return process_of(os.getpid())


def process_of(pid: int) -> list[Any]:
    """A process of this host: the host's name, its number, and when it began.

    Another host, or a container, may bear the same name, and number another process so.
    """
    return [socket.gethostname(), pid, field_of(pid, 19)]


def parent_of(pid: int) -> int | None:
    """The parent of another process, where /proc tells it."""
    return field_of(pid, 1)


def field_of(pid: int, number: int) -> int | None:
    """A number of /proc/PID/stat, counted from after the name, which may have spaces in it."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[number])
    except (OSError, ValueError, IndexError):
        return None


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
