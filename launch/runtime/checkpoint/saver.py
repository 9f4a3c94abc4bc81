"""A run's checkpoints, written while it trains on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.runtime.checkpoint.saving import Snapshot, complete
from launch.runtime.engine import Engine


class Saver:
    """Saves a run's checkpoints, in the background if the configuration says so.

    By default on a GPU: the copy that is written lies in the host's memory, beside the device's.
    A failed save in the background is told at once, and raised by the next `save` or at the end of
    the `with` block, which waits for the last one.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        tokenizer: Path | None,
        say: Callable[[str], None],
    ):
        """`say` prints a line of the run's first rank. All ranks build it together."""
        self.engine, self.directory, self.tokenizer, self.say = engine, directory, tokenizer, say
        wanted = engine.config.checkpoint.background
        self.background = engine.device.type == "cuda" if wanted is None else wanted
        # The threads' exchanges, beside training's.
        self.group = dist.new_group(backend="gloo") if self.background else None
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Save the engine's state; returns as soon as training may go on.

        Raises:
            ValueError: as `save` does, or of the save before this one.
        """
        begin = time.monotonic()
        self.wait()
        snapshot = Snapshot(
            self.engine, self.directory, state, self.tokenizer, self.background, self.group
        )
        held_up = time.monotonic() - begin
        if not self.background:
            final = complete(snapshot)
            self.say(f"checkpoint {final} written in {time.monotonic() - begin:.1f} s")
            return

        def work() -> None:
            try:
                final = complete(snapshot)
            except Exception as error:  # not the end of a thread that nobody waits for yet
                self.failure = error
                self.say(f"saving failed, training goes on to the next checkpoint: {error}")
                return
            self.say(
                f"checkpoint {final} written in {time.monotonic() - begin:.1f} s, training was "
                f"held up for {held_up:.2f} s"
            )

        self.thread = threading.Thread(target=work, name="checkpoint")
        self.thread.start()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join()  # what the run has failed by is told, not this

    def wait(self) -> None:
        """Until the last save is on the disk.

        Raises:
            ValueError: on every rank, if any rank could not write it.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
