"""What an analysis is, the list of all of them, and what running one gives.

Each analysis is whole in one file: its options, what it measures, what its numbers say in words,
tables and figures. The command line, the report and the trajectory are driven by this list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from l2e.analysis.figures import Panels
from l2e.analysis.tables import Table
from l2e.problems import Settings

if TYPE_CHECKING:
    from l2e.analysis.subject import Subject

# In the order of a report. A new analysis is a file that defines ANALYSIS, and its name here.
MODULES = ("scale", "fkr", "probing", "ablation", "decrease", "proxies", "neuromfa", "trajectory")

# How a value of an option is called, and what it may be.
KINDS_OF_VALUE: dict[type, tuple[str, tuple[type, ...]]] = {
    int: ("whole number", (Integral,)),
    float: ("number", (Real,)),
    str: ("text", (str, Path)),
}

# What an analysis may look at; what it says of them is Subject's to give.
Part = Literal["model", "features", "activations", "checkpoints"]


def option(
    default: Any,
    help: str,
    *,
    of: type | None = None,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
    **more: Any,
) -> Any:
    """A field of an `Options`: one keyword in a notebook, one flag on the command line.

    of: its type, where the default is None. least, most: bounds of a number. more: `metavar` or
    `nargs`, as argparse knows them.
    """
    described = {"help": help, "of": of or type(default), "least": least, "most": most}
    return field(default=default, metadata={**described, "choices": choices, "more": more})


def allowed(metadata: Mapping) -> tuple[str, ...]:
    """The values that an option may have; none where any will do."""
    choices = metadata["choices"]
    return choices() if callable(choices) else choices


@dataclass(frozen=True)
class Options(Settings):
    """What a user can choose of an analysis. Raises ValueError for what can't be chosen."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, known = getattr(self, one.name), one.metadata
            if value is None:
                continue
            word, kinds = KINDS_OF_VALUE[known["of"]]
            if several := "nargs" in known["more"]:
                word = f"list, each a {word}"
            chosen = value if several and isinstance(value, list | tuple) else [value]
            fit = all(isinstance(part, kinds) and not isinstance(part, bool) for part in chosen)
            if not fit or (several and chosen is not value):
                raise ValueError(f"{one.name} {value!r}: a {word} is meant")
            least, most, choices = known["least"], known["most"], allowed(known)
            if least is not None and not value >= least:
                raise ValueError(f"{one.name} {value}: at least {least} is meant")
            if most is not None and not value <= most:
                raise ValueError(f"{one.name} {value}: at most {most} is meant")
            if choices and not set(chosen) <= set(choices):
                raise ValueError(f"{one.name} {value}: choose from {', '.join(choices)}")


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    name: on the command line, and of its JSON file. title: of its section in a report. help: one
    line. on: what it looks at. options: its choices. measure(subject, options): the numbers, as
    JSON holds them. panels, notes, tables: what they look like and say, from the numbers alone.
    optional: what it looks at if it is there. points: for each model that the numbers are of, in
    their order, what can be followed over training steps; None where nothing can.
    while_followed: options that differ then.
    """

    name: str
    title: str
    help: str
    on: tuple[Part, ...]
    options: type[Options]
    measure: Callable[[Subject, Any], dict]
    panels: Callable[[dict], Panels]
    notes: Callable[[dict], list[str]]
    tables: Callable[[dict], list[Table]]
    optional: tuple[Part, ...] = ()
    points: Callable[[dict], list[dict[str, float | None]]] | None = None
    while_followed: Mapping[str, Any] = field(default_factory=dict)

    def run(self, subject: Subject, options: Options) -> Result:
        return Result(self, self.measure(subject, options))


@dataclass(frozen=True)
class Result:
    """What an analysis found: `values` as its JSON file holds them, to be seen in three ways."""

    analysis: Analysis
    values: dict

    def table(self, number: int = 0) -> Table:
        """The numbers as a table; of several, `number`. Raises ValueError if there is none."""
        tables = self.analysis.tables(self.values)
        if number >= len(tables):
            raise ValueError(f"{self.analysis.name} has {len(tables)} tables here")
        return tables[number]

    def plot(self, folder: str | Path | None = None) -> Panels:
        """The figures, which a notebook shows; written to `folder` as PNG files if one is named."""
        if folder is not None:
            self._panels.save(Path(folder))
        return self._panels

    @cached_property
    def _panels(self) -> Panels:
        return self.analysis.panels(self.values)

    def to_json(self, folder: str | Path | None = None) -> str:
        """JSON of the values and where they come from; numbers that are not finite are null.
        Written to `folder`/NAME.json if one is named."""
        from l2e.analysis.results import finite, provenance

        text = json.dumps(finite({**self.values, "provenance": provenance()}), indent=1)
        if folder is not None:
            path = Path(folder) / f"{self.analysis.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return text


@cache
def analyses() -> dict[str, Analysis]:
    """All analyses by name, in the order of a report."""
    found = [import_module(f"l2e.analysis.{module}").ANALYSIS for module in MODULES]
    return {analysis.name: analysis for analysis in found}


def run(name: str, subject: Subject, **options: Any) -> Result:
    """One analysis of `subject`; options as `python launch/analyze.py NAME --help` tells them.

    Raises ValueError for an unknown analysis or option, or one that is out of bounds.
    """
    known = analyses()
    if name not in known:
        raise ValueError(f"no analysis {name!r}: there are {', '.join(known)}")
    return known[name].run(subject, known[name].options(**options))
