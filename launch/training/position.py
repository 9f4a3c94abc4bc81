"""How far a run has come, and in which data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.checkpoint.stored import StoredCheckpoint

if TYPE_CHECKING:
    from configs import Config


@dataclass(frozen=True)
class Position:
    """Optimizer steps done, samples of the training set read, tokens trained on.

    They need not be multiples of each other: the global batch may have changed on the way.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, step: int, config: Config) -> Position:
        """The position at a later step of a run with this configuration."""
        samples = (step - self.step) * config.train.global_batch_size
        tokens = samples * config.data.sequence_length
        return Position(step, self.samples + samples, self.tokens + tokens)

    def samples_needed(self, config: Config) -> int:
        """Samples of the training set that the run has read when it ends."""
        return self.after(max(self.step, config.train.steps), config).samples


def position_of(checkpoint: Path | None) -> Position:
    """Where a run that resumes from `checkpoint` goes on; None: at the start.

    Checkpoints written before samples were counted had one batch size from their first step on.
    """
    if checkpoint is None:
        return Position()
    stored = StoredCheckpoint(checkpoint)
    state = stored.state
    samples = state.get("samples")
    if samples is None:
        samples = state["step"] * stored.config.get("train", {}).get("global_batch_size", 0)
    return Position(state["step"], samples, state["tokens"])
