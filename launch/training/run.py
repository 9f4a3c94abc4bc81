"""What belongs to one run: its configuration, its folder, and who speaks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs import Config
from l2e.progress import say
from launch.engine.processes import Process
from launch.engine.profiling import Profiler
from launch.engine.watch import Watch


@dataclass(frozen=True)
class Run:
    """What the whole loop needs to know: the configuration, the folder, and who speaks."""

    config: Config
    folder: Path
    process: Process
    profiler: Profiler
    watch: Watch

    def say(self, message: str) -> None:
        """A line of the run's first rank."""
        if self.process.is_first:
            say(message)
