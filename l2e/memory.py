"""Memory that runs out: how much there is, and which errors mean that there was not enough."""

from __future__ import annotations

import errno
import os
from pathlib import Path

GIB = 2**30
LARGER_MACHINE = "use a machine that has as much, or a smaller model"
# Where a container's limit is told, by the second and the first version of control groups.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_bytes() -> int:
    """What this machine, or the container around this process, has: memory and swap."""
    try:
        words = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        found = {word[0]: int(word[1]) * 1024 for word in words if len(word) == 3}
        whole = [found["MemTotal:"] + found.get("SwapTotal:", 0)]
    except OSError:  # not Linux; swap is not told there
        whole = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        try:
            whole.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(whole)


def exhausted(error: BaseException) -> str | None:
    """Whose memory an error says has run out, "GPU" or "host"; None for other errors."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without the seconds of its import
        return "GPU"
    words = str(error)
    refused = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in words
    cannot = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return "host" if isinstance(error, MemoryError) or refused or cannot else None


def refuse_larger(what: str, needed: int, advice: str) -> None:
    """Raise ValueError where `what` needs more bytes than the host has, before any is taken."""
    if needed > (there := host_bytes()):
        raise ValueError(
            f"{what} takes {needed / GIB:,.1f} GiB of memory, and this machine has "
            f"{there / GIB:,.1f}; {advice}"
        )
