"""Leaving when a batch system asks for it: all ranks after the same step."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class StopSignal:
    """SIGTERM and SIGUSR1 (a batch system's warnings), agreed on by all ranks.

    A signal reaches the ranks at different steps. Each step starts a tiny all-reduce on the host
    that is read one step later, so nobody waits and everybody leaves after the same step.
    """

    def __init__(self) -> None:
        self.received = torch.zeros(1, dtype=torch.int32)
        self.pending: tuple[Any, Tensor] | None = None
        self.group = dist.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        """The signal handler: only remembers."""
        self.received.fill_(1)

    def agreed(self) -> bool:
        """Whether any rank had been signalled by the end of the previous step."""
        answer = False
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            answer = bool(flag.item())
        flag = self.received.clone()
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = (work, flag)
        return answer

    def close(self) -> None:
        """Wait for the last exchange, so that no rank ends with one under way."""
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None
