"""Steps whose loss or gradient is not finite: their update is dropped, and the run decides.

No update is ever made from such a gradient. DeepSpeed's optimizers look at the global norm before
they update (in bf16 by `check_grad_overflow`, which is on); for plain torch ones the engine does,
on the device. So every rank drops the same steps, and the weights stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from configs import Config


class Rollback(Exception):
    """A step went bad and the run is to go back to its newest checkpoint."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class BadSteps:
    """What `train.on_nonfinite` says of a run's steps. Every rank sees the same numbers."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.policy, self.limit = config.train.on_nonfinite, config.train.nonfinite_limit
        self.scaled = config.train.dtype == "fp16"
        self.remedy = f"a lower optimizer.learning_rate or l2e.{config.l2e.strength}"
        self.say = say
        self.dropped = self.in_a_row = 0

    def is_bad(self, record: dict[str, Any]) -> bool:
        """Whether a step's numbers are none. fp16's loss scale overflows now and then by design."""
        norm = record["grad_norm"]
        bad_norm = norm is not None and not math.isfinite(norm) and not self.scaled
        return bad_norm or not math.isfinite(record["lm_loss"])

    def count(self, records: list[dict[str, Any]]) -> None:
        """Note in each record how many steps of this job were dropped up to it."""
        for record in records:
            self.dropped += self.is_bad(record)
            record["dropped_steps"] = self.dropped

    def judge(
        self, records: list[dict[str, Any]], bad_layers: Mapping[str, int] | None = None
    ) -> None:
        """Go on or stop, after the records are written.

        bad_layers: L2E layers, and in which step their activations were not finite.

        Raises:
            ValueError: on every rank, if the run is to stop.
            Rollback: on every rank, if it is to go back.
        """
        layers = ", ".join(bad_layers or ())
        if layers and not any(map(self.is_bad, records)):
            raise ValueError(
                f"NaN or Inf among the activations of blocks {layers}, and a loss that is finite: "
                f"steps {records[0]['step']} to {records[-1]['step']}"
            )
        for record in records:
            if not self.is_bad(record):
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            found = (
                f"the loss is {record['lm_loss']} and the gradient's norm {record['grad_norm']} at "
                f"step {record['step']}; its update was not made"
            )
            if record["step"] in (bad_layers or {}).values():
                found += f" (NaN or Inf among the activations of blocks {layers})"
            if self.policy == "stop":
                raise ValueError(
                    f"{found}. Resume from the last checkpoint with {self.remedy}, or with "
                    "train.on_nonfinite=skip"
                )
            if self.policy == "rollback":
                raise Rollback(found, record["step"])
            if self.in_a_row > self.limit:
                raise ValueError(
                    f"{found}, nor were the {self.limit} before it (train.nonfinite_limit). "
                    f"Resume from the last checkpoint with {self.remedy}"
                )
            self.say(f"{found} (train.on_nonfinite=skip; {self.in_a_row} in a row)")
