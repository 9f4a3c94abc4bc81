"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """tqdm, except that a file or pipe gets plain lines, and none of work that is soon done."""

    def __init__(
        self,
        work: Any = None,
        *,
        desc: str,
        unit: str,
        progress: bool = True,
        file: TextIO | None = None,
        **settings: Any,
    ):
        """work: an iterable, or None with `total` and calls of `update`; progress: show it."""
        file = file or sys.stderr
        if not file.isatty():
            seconds = SECONDS_BETWEEN_LINES
            settings = {"mininterval": seconds, "delay": seconds, "bar_format": LINE} | settings
        output = file if file.isatty() else _PlainLines(file)
        super().__init__(work, desc=desc, unit=unit, disable=not progress, file=output, **settings)

    def advance_to(self, done: int) -> None:
        """Set how much of the work is done in all."""
        self.update(done - self.n)


def say(message: str) -> None:
    """A line on standard output, beside whatever bars are shown."""
    tqdm.write(message)
    sys.stdout.flush()


class _PlainLines:
    """A file of whole lines; what tqdm draws around them is left out."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if text.strip():
            self.file.write(text.strip() + "\n")
            self.flush()

    def flush(self) -> None:
        self.file.flush()
