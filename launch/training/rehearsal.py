"""What `--dry-run` finds of the checkpoint that a run would go on from; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs import Config
from launch.checkpoint import find_resumable
from launch.checkpoint.stored import StoredCheckpoint
from launch.training import data
from launch.training.changes import told_changes
from launch.training.folder import refuse_lost_beginning, refuse_taken, refuse_unusable
from launch.training.loop import last_step
from launch.training.position import position_of


def rehearse(config: Config, folder: Path, resume: str) -> Iterator[str]:
    """Where the run would go on, and what it would do otherwise than before, as lines.

    Raises:
        ValueError: as the run would: of a taken folder, a damaged checkpoint, other data, ...
    """
    refuse_unusable(folder)
    refuse_taken(folder, resume)
    found = find_resumable(folder, resume)
    if found is None:
        if resume == "auto":
            refuse_lost_beginning(folder, print)
        yield "begins     at step 0"
        return
    start, last = position_of(found), last_step(config)
    yield f"resumes    {found}, at step {start.step:,} with {start.samples:,} samples read"
    if start.step >= last:
        yield f"nothing left to do: step {start.step:,} of {last:,} is done"
        return
    paths = data.already_here(config, folder)
    StoredCheckpoint(found).refuse_another(config.model, paths.tokenizer if paths else None)
    if paths is None:
        yield "whether it is the same data is seen when the run starts: it is not here yet"
    else:
        before = data.data_of(found, print)
        corpus = data.open_corpus(config, None, paths, start, before.get("laid_out", ()))
        corpus.refuse_other(before)
    yield from told_changes(found, config, start.step)
