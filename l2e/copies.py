"""Hooks that a copy or a pickle of their module does not carry along."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn


class ScriptingError(ValueError, AttributeError):
    """Who merely asks whether a hook has a name learns that it has none."""


class Unscriptable:
    """In the place of a hook's name, which only torch.jit.script needs."""

    def __get__(self, hook: Any, owner: Any) -> str:
        if hook is None:
            return owner.__qualname__
        raise ScriptingError(
            "l2e: torch.jit.script cannot compile the hooks of an attached model, or of a copy of "
            "one that was never called: call handle.detach() before it, or script a copy that has "
            "been called once"
        )


class OwnHook:
    """A hook that serves the module it was made for, and none of its copies."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.copies: list[weakref.ref[nn.Module]] = []

    def __reduce__(self) -> tuple[type[CopiedHook], tuple[()]]:
        return CopiedHook, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedHook:
        if (copied := memo.get(id(self.module))) is not None:
            self.copies.append(weakref.ref(copied))
        return CopiedHook()

    __name__ = Unscriptable()

    def clean_copies(self) -> None:
        """Take what stands for this hook out of the copies that still have it."""
        for reference in self.copies:
            if (module := reference()) is not None:
                _remove_copied_hooks(module)


class CopiedHook:
    """Stands for a hook in a copied or unpickled module, until that is first called."""

    __name__ = Unscriptable()

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        _remove_copied_hooks(module)
        tell_of_copy(module)


def tell_of_copy(module: nn.Module) -> None:
    if module.training and torch.is_grad_enabled():
        warnings.warn(
            "l2e: a copy of an attached model runs in training mode. It is neither observed "
            "nor inhibited: attach to the copy as well if it should be",
            stacklevel=3,
        )


def _remove_copied_hooks(module: nn.Module) -> None:
    for hooks, others in (
        (module._forward_hooks, [module._forward_hooks_with_kwargs]),
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
    ):
        for number in [n for n, hook in hooks.items() if isinstance(hook, CopiedHook)]:
            for registered in (hooks, *others):
                registered.pop(number, None)  # type: ignore[attr-defined]
