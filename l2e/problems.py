"""A user's mistake, told so that it can be mended: one record, and the report of several."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self


class Problem(ValueError):
    """One mistake: which key or file, what was found, why it can't be, what to do.

    Raised where the work has to stop, and listed where everything wrong is told at once. `value`
    is a configuration's value, the path of a file, or None where nothing was found.
    """

    def __init__(self, key: str, value: object, reason: str, fix: str) -> None:
        super().__init__(key, value, reason, fix)
        self.key, self.value, self.reason, self.fix = key, value, reason, fix

    def __str__(self) -> str:
        return f"{self._found()}: {self.reason}; {self.fix}"

    def _found(self) -> str:
        if self.value is None:
            return self.key
        if isinstance(self.value, Path) or self.key.startswith("--"):
            return f"{self.key} {self.value}"
        shown = repr(self.value)
        return f"{self.key} = {shown if len(shown) <= 80 else shown[:77] + '...'}"

    def within(self, section: str) -> "Problem":
        """The same mistake, its key named as one of `section`."""
        return Problem(f"{section}.{self.key}", self.value, self.reason, self.fix)


class ConfigError(ValueError):
    """Everything that is wrong with one configuration."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        super().__init__(source, problems)
        self.source, self.problems = source, list(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.source}: {count} error{'s' if count > 1 else ''}"
        return "\n  ".join([head, *map(str, self.problems)])


class Settings:
    """Base of a dataclass that tells a key which it does not have, by a ConfigError."""

    def __new__(cls, *_: Any, **given: Any) -> Self:
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        unknown = [
            Problem(name, value, "unknown key", suggest(name, known))
            for name, value in given.items()
            if name not in known
        ]
        if unknown:
            raise ConfigError(cls.__name__, unknown)
        return super().__new__(cls)


def first_line(error: BaseException) -> str:
    """What an error of another's code says, without the pages that may follow."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def suggest(name: str, known: Sequence[str]) -> str:
    """The nearest of the known names, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known) or 'none'}"
