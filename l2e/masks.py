"""Which samples of a model's forward pass count: what its mask says, or that there is none."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable
from torch.nn.parallel import DistributedDataParallel

from l2e.copies import OwnHook
from l2e.hook import ForwardPass

LOOKS_FOR_PADDING = 10  # steps; each look waits for the device


class ModelHook(OwnHook):
    """Before the model's forward pass: takes its mask, or tells once that there is padding.

    Args:
        mask: the argument of the model's forward that is true where a sample counts; None: look
            for padding in `attention_mask`.
        attached: the names of the modules whose samples it is of.

    Attributes:
        joined: the last pass ran under a wrapper that takes part in a Join of uneven inputs.
    """

    def __init__(
        self, model: nn.Module, forward_pass: ForwardPass, mask: str | None, attached: list[str]
    ) -> None:
        super().__init__(model)
        self.forward_pass, self.takes = forward_pass, mask is not None
        self.argument = mask or "attention_mask"
        parameters = inspect.signature(model.forward).parameters
        names = list(parameters)
        if mask is not None:
            _refuse_opposite(mask)
            _refuse_other_half(mask, names, attached)
        self.position = names.index(self.argument) if self.argument in names else None
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if mask is not None and self.position is None and not anything:
            raise ValueError(
                f"l2e.attach: mask = {mask!r}: the model's forward has no such argument, it has "
                f"{', '.join(names)}; name one of them, or give the mask with handle.mask(tensor)"
            )
        if self.takes:
            forward_pass.masked_inside = 0
        self.steps_to_look = LOOKS_FOR_PADDING
        self.missing_told = False
        self.joined = False

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.module:
            return
        self.forward_pass.evaluated = not module.training
        if self.forward_pass.masked_inside is not None:
            self.forward_pass.masked_inside += 1
        if not (torch.is_grad_enabled() or self.forward_pass.observe_no_grad):
            return
        if not torch.compiler.is_compiling():
            self.joined = _joined(module)
        value = kwargs.get(self.argument)
        if value is None and self.position is not None and self.position < len(args):
            value = args[self.position]
        if self.takes:
            if not (value is None or isinstance(value, Tensor)):
                raise ValueError(
                    f"l2e: mask = {self.argument!r}: this forward pass is given a "
                    f"{type(value).__name__}: expected a tensor, true or 1 for what counts, or None"
                )
            self.forward_pass.counted = value
            self._look_for_argument(args, kwargs)
        elif value is not None and not torch.compiler.is_compiling():
            self._look_for_padding(value)

    def _look_for_argument(self, args: Any, kwargs: Any) -> None:
        """A name that only **kwargs would take may be one that nobody gives."""
        lost = self.position is None and self.argument not in kwargs and self.module.training
        if lost and not self.missing_told and not torch.compiler.is_compiling():
            self.missing_told = True
            given = ", ".join([*kwargs]) or "none by name"
            warnings.warn(
                f"l2e: mask = {self.argument!r} is not among the arguments of this forward pass "
                f"({given}): every sample of it counts",
                stacklevel=2,
            )

    def _look_for_padding(self, mask: Any) -> None:
        looks = self.module.training and self.steps_to_look > 0 and not self.forward_pass.paused
        if not (looks and self.forward_pass.counted is None and isinstance(mask, Tensor)):
            return
        if mask.dim() == 2 and bool((mask == 0).any()):
            self.steps_to_look = 0
            warnings.warn(
                "l2e: attention_mask has zeros, so this model is given padding, which is counted "
                'and inhibited like everything else: attach(..., mask="attention_mask") leaves it '
                "out",
                stacklevel=2,
            )


def _refuse_other_half(mask: str, arguments: list[str], attached: list[str]) -> None:
    """The encoder's samples are not the decoder's."""
    encoders = mask.removeprefix("decoder_")
    decoders = f"decoder_{encoders}"
    if not {encoders, decoders} <= set(arguments):
        return
    other = decoders if mask == encoders else encoders
    wrong = [name for name in attached if ("decoder" in name.split(".")) == (other == decoders)]
    if wrong:
        raise ValueError(
            f"l2e.attach: mask = {mask!r} is of other samples than those of {', '.join(wrong)}: "
            f"give these a handle of their own, with mask={other!r}"
        )


def _refuse_opposite(mask: str) -> None:
    if mask.endswith(("padding_mask", "pad_mask")):
        raise ValueError(
            f"l2e.attach: mask = {mask!r}: such an argument is commonly true where padding is, the "
            "opposite of what counts: attach without mask=, and before each forward pass call "
            f"handle.mask(~{mask})"
        )


class AfterModelHook(OwnHook):
    """After the forward pass of a model that `ModelHook` takes masks from."""

    def __init__(self, module: nn.Module, forward_pass: ForwardPass) -> None:
        super().__init__(module)
        self.forward_pass = forward_pass

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self.module and self.forward_pass.masked_inside:
            self.forward_pass.masked_inside -= 1


def _joined(module: nn.Module) -> bool:
    wrapper = module
    if not isinstance(wrapper, Joinable):
        wrapper = DistributedDataParallel._get_active_ddp_module()
    return wrapper is not None and wrapper._join_config.enable
