"""How a user's mistakes in a configuration are told: all at once, each with its way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One mistake: which key, what was found, why it can't be, what to do."""

    key: str
    value: Any
    reason: str
    fix: str

    def __str__(self) -> str:
        found = repr(self.value)
        if len(found) > 80:
            found = found[:77] + "..."
        return f"{self.key} = {found}: {self.reason}; {self.fix}"


class ConfigError(ValueError):
    """Everything that is wrong with one configuration."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"{source}: {count} error{'s' if count > 1 else ''}"]
        super().__init__("\n".join(lines + [f"  {problem}" for problem in self.problems]))
