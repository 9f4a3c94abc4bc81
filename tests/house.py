"""`python -m tests.house`: how the files of the house may know of each other.

Imports run downward only, in no circle, and to modules that exist. The arrows are those of
docs/architecture.md. An import inside a function counts as one at the top; one for type checkers
alone counts for the direction, not for a circle.

A name with a leading underscore is its own file's: no other file imports it, reaches it as an
attribute, or puts another thing in its place.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# What each package may import beside itself.
BELOW = {
    "l2e": set(),
    "l2e.analysis": {"l2e"},
    "model": {"l2e"},
    "data": {"l2e"},
    "configs": {"l2e", "model", "data"},
}
LOWER = {"l2e", "l2e.analysis", "model", "data", "configs"}
LEVELS = [
    {"launch.cli"},
    {"launch.planning"},
    {"launch.engine"},
    {"launch.checkpoint"},
    {"launch.evaluation", "launch.comparison"},
    {"launch.training"},
    {"launch"},  # the verbs
]
for level, packages in enumerate(LEVELS):
    BELOW |= dict.fromkeys(packages, LOWER.union(*LEVELS[:level]))


class Arrow(NamedTuple):
    """One import: of which module by which, on which line, and whether for type checkers alone."""

    source: str
    target: str
    line: int
    typing: bool


def main() -> int:
    """Print what is wrong with the house; the exit status."""
    wrong = wrong_in(ROOT)
    for line in wrong:
        print(line)
    return 1 if wrong else 0


def wrong_in(root: Path) -> list[str]:
    """Every import under `root` that should not be."""
    modules = find_modules(root)
    arrows = [arrow for name, path in modules.items() for arrow in imports(name, path, modules)]
    return [*upward(arrows), *missing(arrows, modules), *circles(arrows), *trespasses(root)]


def find_modules(root: Path) -> dict[str, Path]:
    """{dotted name: file} of every package."""
    modules = {}
    for package in {name.partition(".")[0] for name in BELOW}:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[Arrow]:
    """What one module imports from the project."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_typing = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    own = {package.partition(".")[0] for package in BELOW}
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [one if one in modules else node.module for one in inside]
        for target in targets:
            if target.partition(".")[0] in own and target != name:
                yield Arrow(name, target, node.lineno, node in for_typing)


def package_of(module: str) -> str:
    """The package of `BELOW` that a module belongs to."""
    parts = module.split(".")
    return next(
        name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in BELOW
    )


def upward(arrows: list[Arrow]) -> Iterator[str]:
    """Imports that the order of the packages forbids."""
    for source, target, line, _ in arrows:
        above, below = package_of(source), package_of(target)
        # A package's own top hands on names of what is in it.
        if above == below or below in BELOW[above] or (below == "launch" and target == "launch"):
            continue
        yield f"{source}:{line} imports {target}: {above} may not import {below}"


def missing(arrows: list[Arrow], modules: dict[str, Path]) -> Iterator[str]:
    """Imports of modules that are not there."""
    for source, target, line, _ in arrows:
        if target not in modules:
            yield f"{source}:{line} imports {target}, which does not exist"


def circles(arrows: list[Arrow]) -> Iterator[str]:
    """Modules that import each other, by however many steps."""
    below: dict[str, set[str]] = {}
    for source, target, _, typing in arrows:
        if not typing:
            below.setdefault(source, set()).add(target)
    reported: set[frozenset[str]] = set()
    for start in below:
        path = way_back(start, below)
        if path and frozenset(path) not in reported:
            reported.add(frozenset(path))
            yield f"a circle: {' imports '.join([*path, start])}"


def way_back(start: str, below: dict[str, set[str]]) -> list[str] | None:
    """The shortest way from a module over its imports back to itself."""
    paths, seen = [[start]], {start}
    while paths:
        path = paths.pop(0)
        for target in sorted(below.get(path[-1], ())):
            if target == start:
                return path
            if target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return None


def trespasses(root: Path) -> Iterator[str]:
    """Private names that a file other than their own uses."""
    folders = [*sorted({name.partition(".")[0] for name in BELOW}), "bench", "docs", "tests"]
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    own = {path: set(private_names(tree)) for path, tree in trees.items()}
    everyones = set().union(*own.values())
    for path, tree in trees.items():
        for name, line in uses(tree):
            if name in everyones - own[path]:
                yield f"{path.relative_to(root)}:{line} uses {name}, which is another file's own"


def is_private(name: str) -> bool:
    """A trailing underscore, too, makes the name one of Python's or of a notebook's."""
    return name.startswith("_") and not name.endswith("_")


def private_names(tree: ast.AST) -> Iterator[str]:
    """What a file defines or sets under a private name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        else:
            continue
        if is_private(name):
            yield name


def uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What a file imports, reaches as an attribute, or replaces by name, and on which line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr")):
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            yield from ((name, node.lineno) for name in names if isinstance(name, str))


if __name__ == "__main__":
    sys.exit(main())
