"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit} [{elapsed}, {remaining} left, {rate_fmt}]"


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
            settings |= {"mininterval": seconds, "delay": seconds, "bar_format": LINE}
        super().__init__(work, desc=desc, unit=unit, disable=not progress, file=file, **settings)

    @staticmethod
    def status_printer(file: TextIO):
        """What shows a new state of the bar."""
        if file.isatty():
            return tqdm.status_printer(file)
        lines = 0

        def add_line(text: str) -> None:
            nonlocal lines
            file.write("\n" + text if lines else text)  # tqdm itself ends the last one
            file.flush()
            lines += 1

        return add_line
