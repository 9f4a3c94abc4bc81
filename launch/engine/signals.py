"""Leaving when asked to, from the first import on.

This file imports nothing heavy, and pretrain.py imports it first. Python runs a signal's handler
between two of the main thread's instructions, which may wait for minutes in another library; the
number of the signal reaches a thread here at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable

# The end that a batch system or launcher sets, a batch system's warnings (LSF's and Grid Engine's
# second one, the limit of processor time), the end of a terminal, Ctrl-C.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
STOPPING = (signal.SIGTERM, *WARNINGS, signal.SIGHUP, signal.SIGINT)
# Launchers pass a signal on that the ranks have had already, or send two kinds.
ECHO_SECONDS = 1.0


def leave(status: int, message: str) -> None:
    """End this process now, whatever its other threads wait for."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())
    os._exit(status)


def status_of(number: int) -> int:
    """The exit status of a run that a signal has ended in order."""
    return 130 if number == signal.SIGINT else 0


def beside_standard_files(descriptor: int) -> int:
    """The same file under a number above 2: whoever closed these would have it take a library's
    messages for signals."""
    if descriptor > 2:
        return descriptor
    above = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return above


class StopRequest:
    """Whether this process has been asked to leave.

    The training loop looks at `number` after each step. Where no step would be lost,
    `nothing_to_lose`, the process leaves at once; at a second signal it does in any case.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        self.signalled = False
        self.nothing_to_lose = True
        self.launched = False  # by a launcher, which may send each signal twice
        self.tell: list[Callable[[int, bool], None]] = []  # of a request, and whether we leave now

    def listen(self) -> StopRequest:
        """Take signals from now on. Called by the main thread."""
        reading, writing = map(beside_standard_files, os.pipe())
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in STOPPING:
            # nohup ignores SIGHUP for us. A shell's & ignores SIGINT, but Ctrl-C means us.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self.read, args=(reading,), name="signals", daemon=True).start()
        return self

    def read(self, pipe: int) -> None:
        """The thread's work: one byte a signal, its number."""
        while True:
            for number in os.read(pipe, 64):
                if number in STOPPING:
                    self.receive(number)

    def receive(self, number: int) -> None:
        """A signal to this process."""
        first, self.signalled = not self.signalled, True
        if first:
            self.ask(number, signal.Signals(number).name)
        elif number == signal.SIGXCPU:
            pass  # the kernel repeats it every second
        elif not self.launched or time.monotonic() - self.since > ECHO_SECONDS:
            self.announce(number, at_once=True)
            name = signal.Signals(number).name
            leave(128 + number, f"a second signal ({name}): left without saving")

    def ask(self, number: int, name: str) -> None:
        """A signal, or what is taken for one: another rank's, or the launcher's end."""
        if self.number is None:
            self.number, self.since = number, time.monotonic()
            self.announce(number, at_once=self.nothing_to_lose)
        if self.nothing_to_lose:
            leave(status_of(number), f"stopped by {name}; no step was left to save")

    def announce(self, number: int, at_once: bool) -> None:
        """Let the other ranks know."""
        for tell in self.tell:
            tell(number, at_once)


STOP = StopRequest()
