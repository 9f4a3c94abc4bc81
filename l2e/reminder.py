"""What optimizers' steps tell: that nobody steps a handle; that a batch is evaluated again."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from l2e.controller import Controller

UPDATES = 3  # steps of one optimizer without a step of the handle, before it is told
ROUNDS = 50  # losses taken without one, where no torch optimizer has the model's parameters


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step of a fused optimizer changed nothing, for a gradient scaler's sake."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


_at_work: weakref.WeakSet[StepReminder] = weakref.WeakSet()


@cache
def _hear_of_steps() -> None:
    """Once in a process, and never taken back: optimizers iterate over the registry of all their
    hooks, while the garbage collector may come upon a handle."""
    register_optimizer_step_pre_hook(_stepping)
    register_optimizer_step_post_hook(_stepped)


def _stepping(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if torch.compiler.is_compiling() or not callable(closure):
        return None
    for reminder in list(_at_work):
        if reminder.trained_by(optimizer):
            closure = _counted_once(closure, reminder.controller)
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, kwargs | {"closure": closure}


def _counted_once(closure: Callable[[], Any], controller: Controller) -> Callable[[], Any]:
    """LBFGS evaluates one batch several times in a step: its samples count at the first."""
    evaluated = False

    def evaluate() -> Any:
        nonlocal evaluated
        with controller.uncounted() if evaluated else nullcontext():
            evaluated = True
            return closure()

    return evaluate


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        for reminder in list(_at_work):
            reminder.optimizer_stepped(optimizer)


class StepReminder:
    """Counts what happens between two steps of a handle."""

    def __init__(self, model: nn.Module, controller: Controller) -> None:
        self.model, self.controller = weakref.ref(model), controller
        self.told = False
        self.reset()
        _at_work.add(self)
        _hear_of_steps()

    def detach(self) -> None:
        _at_work.discard(self)

    def reset(self) -> None:
        """The handle has stepped."""
        self.observed, self.rounds = False, 0
        self.updates: dict[int, int] = {}

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self.told or not self.observed or skipped(optimizer) or not self.trained_by(optimizer):
            return
        count = self.updates[id(optimizer)] = self.updates.get(id(optimizer), 0) + 1
        if count == UPDATES:
            self._tell(f"{type(optimizer).__name__} stepped {count} times")

    def loss_taken(self) -> None:
        self.rounds += 1
        if self.rounds == ROUNDS and not self.told:
            self._tell(f"handle.loss() was taken {ROUNDS} times")

    def trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        model = self.model()
        own = set() if model is None else {id(p) for p in model.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _tell(self, what: str) -> None:
        self.told = True
        warnings.warn(
            f"l2e: {what} without handle.step(), so the statistics stand still and nothing will "
            "be inhibited: call handle.step() once after each optimizer step, or "
            "attach(..., optimizer=optimizer); a Trainer needs "
            "callbacks=[handle.trainer_callback()]",
            stacklevel=2,
        )
