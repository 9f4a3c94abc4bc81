"""What belongs to one run: its configuration, its folder, and who speaks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from configs import Config
from data.lock import Held, Lock
from l2e.progress import say
from launch.engine.processes import Process
from launch.engine.profiling import Profiler
from launch.engine.watch import Watch


class Claim:
    """The first rank's hold on the run's folder; the other ranks have none of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock: Lock | None = None

    def take(self) -> None:
        """Have the folder, which is made where it is missing; as `keep` otherwise."""
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.keep()

    def keep(self) -> None:
        """Have the folder still: it may have been moved away, or another put in its place.

        Raises:
            ValueError: another process has it.
            OSError: it cannot be written.
        """
        if dist.get_rank() != 0:
            return
        try:
            if self.lock is None:
                self.lock = Lock(self.folder / "lock")
            self.lock.keep()
        except Held as held:
            raise ValueError(
                f"--run-dir {self.folder}: {held} is training in this folder; end it, or give "
                "another folder"
            ) from None


@dataclass(frozen=True)
class Run:
    """What the whole loop needs to know: the configuration, the folder, and who speaks."""

    config: Config
    folder: Path
    process: Process
    profiler: Profiler
    watch: Watch
    claim: Claim

    def say(self, message: str) -> None:
        """A line of the run's first rank."""
        if self.process.is_first:
            say(message)
