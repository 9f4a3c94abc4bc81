"""What any rank has noticed, known to all of them after the same step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.engine.signals import StopRequest


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
