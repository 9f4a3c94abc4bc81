"""Tables of numbers, for a notebook, a terminal and a page."""

import html
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """head: the columns' names; rows: their cells, None where there is no number."""

    head: list[str]
    rows: list[list]

    def __str__(self) -> str:
        """Columns in line, the first on the left and the others on the right."""
        lines = [self.head, *([cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                text.rjust(width) if place else text.ljust(width)
                for place, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [
            "".join(f"<th>{html.escape(name)}</th>" for name in self.head),
            *("".join(f"<td>{html.escape(cell(v))}</td>" for v in row) for row in self.rows),
        ]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def cell(value: object) -> str:
    """Three digits of a number, or n/a."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "n/a"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"
