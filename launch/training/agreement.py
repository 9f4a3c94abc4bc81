"""That all ranks train the same run, and what any has noticed, known to all after the same step."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs import Config
from launch.checkpoint.resumable import find_resumable, listed
from launch.engine.signals import StopRequest
from launch.training.changes import unlike
from launch.training.provenance import versions

# A disk of the network shows a new folder to other hosts after a minute at most.
SEEN_BY_ALL = 90  # seconds


def refuse_other_runs(config: Config, folder: Path, resume: str) -> None:
    """Raise ValueError on every rank where some were started otherwise; all call it.

    Their gradients would be added up all the same.
    """

    def tell() -> dict[str, Any]:
        sections = json.loads(config.model_dump_json(exclude={"data": {"cache_dir"}}))
        own = {"--run-dir": str(folder), "--resume": resume, "versions": versions()}
        return own | sections

    refuse_disagreement(tell, "start every rank by the same command, from the same files")


def find_together(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` means; all ranks call it, and have to see the same ones.

    Raises:
        ValueError: on every rank, as `find_resumable`, or where a host sees others than the first.
    """
    fix = "every host needs the same folder, on a disk that all of them share"
    refuse_disagreement(partial(listed, folder, resume), fix, SEEN_BY_ALL)
    return find_resumable(folder, resume)


def refuse_disagreement(tell: Callable[[], dict[str, Any]], fix: str, seconds: int = 0) -> None:
    """Raise ValueError on every rank where one is told otherwise than the first.

    tell: what this rank is told, as nested dicts; asked again for so many seconds where it is not
    alike.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    for attempt in range(seconds + 1):
        if attempt:
            time.sleep(1)
        dist.all_gather_object(everyone, (socket.gethostname(), tell()))
        if all(told == everyone[0][1] for _, told in everyone):
            return
    first_host, first = everyone[0]
    rank, host, other = next(
        (rank, host, told) for rank, (host, told) in enumerate(everyone) if told != first
    )
    name, expected, found = next(unlike(first, other))
    raise ValueError(
        f"{name} is {found!r:.200} on rank {rank} ({host}), and {expected!r:.200} on rank 0 "
        f"({first_host}); {fix}"
    )


class Agreement:
    """A signal reaches the ranks at different steps; they must leave after the same one.

    Each step starts a tiny all-reduce on the host that is read one step later, so nobody waits.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.pending: tuple[Any, Tensor] | None = None
        self.group = dist.new_group(backend="gloo")

    def signal(self) -> int:
        """The number of a signal that any rank had by the end of the previous step, or 0."""
        answer = 0
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            answer = int(flag.item())
        flag = torch.tensor([self.request.number or 0], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = (work, flag)
        return answer

    def close(self) -> None:
        """Wait for the last exchange, so that no rank ends with one under way."""
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None
