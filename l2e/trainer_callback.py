"""What `transformers.Trainer` calls: one step of the method for each of its optimizer steps."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from l2e.attachment import Handle

FILE = "l2e.pt"


class StepCallback(TrainerCallback):
    """Steps, scales the injected gradient, saves the state in `checkpoint-*/l2e.pt`, restores it.

    Raises:
        ValueError: the handle does not inject, or follows an optimizer already.
    """

    def __init__(self, handle: Handle) -> None:
        if not handle.inject:
            raise ValueError(
                "l2e: a Trainer computes its own loss; use attach(..., inject=True), which adds "
                "L_MS's gradient in the backward pass"
            )
        if handle.optimizer is not None:
            raise ValueError("l2e: the callback steps; attach without optimizer=")
        self.handle = handle
        self.window = 0  # optimizer steps since the epoch began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            raise ValueError(
                "l2e: fp16 = True: the Trainer does not tell callbacks its loss scale, "
                "which L_MS's gradient needs; use bf16 = True"
            )
        self.handle.discard()  # what a training that was broken off has left, as on out-of-memory
        if state.global_step > 0 and self.handle.controller.phase.step != state.global_step:
            self._restore(args, state.global_step)

    def _restore(self, args: Any, step: int) -> None:
        named = args.resume_from_checkpoint
        folders = [Path(args.output_dir) / f"checkpoint-{step}"]
        if isinstance(named, str) and os.path.isdir(named):
            folders.insert(0, Path(named))
        for folder in folders:
            if (folder / FILE).is_file():
                state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
                self.handle.load_state_dict(state)
                return
        raise ValueError(
            f"l2e: the Trainer resumes at step {step}, but there is no {FILE} in "
            f"{' or '.join(map(str, folders))}; before train(), call "
            f"handle.load_state_dict(torch.load('.../{FILE}'))"
        )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = _batches(kwargs.get("train_dataloader"))
        resumes_inside = batches and not args.ignore_data_skip
        windows = math.ceil(batches / args.gradient_accumulation_steps)
        self.window = state.global_step % windows if resumes_inside else 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        window = args.gradient_accumulation_steps
        if batches := _batches(kwargs.get("train_dataloader")):
            window = min(window, batches - self.window * window)
        self.handle.controller.gradient_scale = 1 / max(window, 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.window += 1
        self.handle.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = self.handle.state_dict()
        if state.is_world_process_zero:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            torch.save(tensors, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            logging.getLogger("l2e").info("l2e: statistics and thresholds saved in %s", file)


def _batches(dataloader: Any) -> int:
    """Micro-batches of an epoch; 0 if the data do not tell."""
    try:
        return len(dataloader)
    except TypeError:
        return 0
