"""Logs, and the process's own output, whose failures never end training."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TextIO, TypeVar

Sink = TypeVar("Sink")
TELL_EVERY = 60.0  # seconds between two warnings of one log
KEPT = 100_000  # entries that wait for a disk that can be written again


class Unfailing(Generic[Sink]):
    """A log file that may be on a full disk, read-only, or gone.

    What could not be written waits in memory and is written, in order, when it can be.
    """

    def __init__(self, name: str, open_it: Callable[[], Sink], say: Callable[[str], None]) -> None:
        self.name, self.open_it, self.say = name, open_it, say
        self.sink: Sink | None = None
        self.waiting: deque[Callable[[Sink], object]] = deque(maxlen=KEPT)
        self.told = -TELL_EVERY
        self.failing = False

    def write(self, action: Callable[[Sink], object]) -> None:
        """Do `action` to the log, now or as soon as it can be written."""
        self.waiting.append(action)
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write what waits, or say that it cannot be written."""
        try:
            if self.sink is None:
                self.sink = self.open_it()
            while self.waiting:
                self.waiting[0](self.sink)
                self.waiting.popleft()
        except Exception as error:  # TensorBoard's writer raises what its thread has met
            self.sink = None
            self.failing = True
            if time.monotonic() - self.told >= TELL_EVERY:
                self.told = time.monotonic()
                self.say(
                    f"{self.name} cannot be written ({error}); training goes on, "
                    f"{len(self.waiting)} entries wait"
                )
            return
        if self.failing:
            self.failing, self.told = False, -TELL_EVERY
            self.say(f"{self.name} is written again; nothing of it is missing")

    def close(self) -> None:
        """The last time to write what waits; what cannot be written is lost."""
        if self.waiting:
            self.write_waiting()
        if self.waiting:
            self.say(
                f"{self.name} cannot be written: its last {len(self.waiting)} entries are lost"
            )
            self.waiting.clear()


class UnfailingOutput:
    """Standard output or error, which may lie on a full disk, or be a pipe that nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost = stream, 0

    def write(self, text: str) -> int:
        """Write, or count what is lost, which is told when something can be written again."""
        try:
            if self.lost:
                self.stream.write(f"({self.lost} pieces of output could not be written here)\n")
            self.stream.write(text)
            self.lost = 0
        except OSError:
            self.lost += 1
        return len(text)

    def flush(self) -> None:
        """What a full disk does not take waits in the stream's own buffer."""
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Whoever writes to standard output or error within never fails by that."""
    streams = sys.stdout, sys.stderr
    out, error = map(UnfailingOutput, streams)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):  # type: ignore[type-var]
            yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError:  # what waits there would be the process's last failure
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
