"""Files that are mapped into memory, and are cut short, or whose disk fails, while they are read.

Their reader is ended by the signal SIGBUS, without a word. Here it says which file it was.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

SIGINFO = 4  # SA_SIGINFO of Linux: the handler is told the address
MASK_BYTES = 128  # of glibc's sigset_t
ADDRESS_AT = 16  # where siginfo_t has it, in bytes
STATUS = 1  # a disk may come back; a file that is really damaged is refused when it is opened

Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Action(ctypes.Structure):
    """`struct sigaction` of Linux's C libraries."""

    _fields_ = [
        ("handler", Handler),
        ("mask", ctypes.c_byte * MASK_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


@Handler
def explain(number: int, information: int, _: int) -> None:
    """Say which file it was, and leave. Runs in the thread that read it, in the place of reading.

    Python's own handlers run between two of its instructions, which would never come.
    """
    signal_c(number, None)  # whatever goes wrong in here, the next one ends the process
    address = ctypes.c_uint64.from_address(information + ADDRESS_AT).value
    name = file_at(address) or "a file that is mapped into memory"
    message = (
        f"error: {name}: was cut short while it was read, or its disk failed (SIGBUS); put it back "
        "as it was and start again"
    )
    os.write(2, f"\n{message}{last_words()}\n".encode())
    os._exit(STATUS)


def signal_c(number: int, handler: int | None) -> None:
    """The C library's `signal`; None is the default action."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(number, handler)


def file_at(address: int) -> str:
    """The file whose map has this address; "" if it is no file's."""
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        span, *rest = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end and len(rest) == 5:
            return rest[4]
    return ""


def nothing() -> str:
    return ""


last_words: Callable[[], str] = nothing


def explain_bus_errors(more: Callable[[], str] = nothing) -> None:
    """From now on, a map that fails is told before it ends this process; `more()` is the end of
    what is said, such as where a run goes on from."""
    global last_words
    last_words = more
    if sys.platform == "linux":
        action = Action(explain, (ctypes.c_byte * MASK_BYTES)(), SIGINFO, None)
        ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None)
