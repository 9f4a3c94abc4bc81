"""Read a configuration file, apply overrides, and report every mistake in it at once."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs.checks import cross_check, warnings
from configs.schema import Config
from l2e.config import L2EConfig
from l2e.files import once
from l2e.problems import ConfigError, Problem

# Keys of earlier versions, and what they are called now.
MOVED = {
    "data.corpus": "data.path",
    "l2e.monitor": "monitor.features",
    "l2e.monitor_interval": "monitor.interval",
}
# From here on whole numbers are too large for sizes and counts (torch's and NumPy's are 32 bits).
LARGEST = 2**31
# Characters of a part of a path, with room for an ending such as .manifest.json.
LONGEST_NAME = 230
# Nor can training use a number that float32 makes infinity or, at full precision, 0 of.
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38
# Keys whose numbers are bounded otherwise: by the schema, or by nothing, as a blend's weights.
WITHOUT_BOUNDS = {"train.seed", "data.path", "deepspeed"}


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    processes: int | None = None,
    dealt: bool = True,
) -> Config:
    """The checked configuration in `path`.

    overrides: `a.b=c` each; the value is read as JSON where it parses, as text elsewhere.
    processes: ranks of this run; default: the file's own `parallel.processes`, or 1.
    dealt: whether the global batch has to be dealt out to these; not for who looks for a layout.
    Raises ConfigError, a ValueError, that lists every mistake.
    """
    raw = override(read(Path(path)), overrides)
    moved = follow_moves(raw)
    config, problems = validate(raw)
    problems += moved
    mistaken = {problem.key for problem in problems}
    try:
        problems += [p for p in cross_check(config, processes, dealt) if p.key not in mistaken]
    except OSError as error:  # of a folder that may not be looked into, for example
        reason = f"cannot be read ({error.strerror})"
        problems.append(Problem(str(error.filename), None, reason, "name another file"))
    if problems:
        raise ConfigError(str(path), problems)
    for line in warnings(config):
        logging.getLogger("configs").warning("%s", line)
    return config


def read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; a ConfigError where there is none."""

    def mistaken(value: Any, reason: str, fix: str) -> ConfigError:
        return ConfigError(str(path), [Problem("--config", value, reason, fix)])

    try:
        raw = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=once)
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in Path(__file__).parent.glob("*.json")))
        fix = f"give an existing file, for example one of {known}"
        raise mistaken(path, "no such file", fix) from None
    except (ValueError, RecursionError, OSError) as error:
        raise mistaken(path, f"not readable as JSON ({error})", "mend the file") from None
    if not isinstance(raw, dict):
        raise mistaken(raw, "not a JSON object", "write sections in { }")
    return raw


def override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `a.b=c` put in place; a section's other keys stay as they are."""
    raw = copy.deepcopy(raw)
    for assignment in overrides:
        if mistake := assign(raw, assignment):
            raise ConfigError("command line", [Problem("--set", assignment, *mistake)])
    return raw


def assign(raw: dict[str, Any], assignment: str) -> tuple[str, str] | None:
    """Put one `a.b=c` in place; why that cannot be done, and what to do."""
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        return "no 'key=value'", "write --set train.steps=100"
    try:
        value = json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError):
        value = text
    except ValueError as error:
        return str(error), "write a value that JSON can hold"
    for path, inner in single_keys(name.split("."), value):
        *sections, leaf = path
        place: Any = raw
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                return f"{section} is no section", "see --help-config"
        place[leaf] = inner
    return None


def single_keys(path: list[str], value: Any) -> Iterator[tuple[list[str], Any]]:
    """What `path=value` sets, key by key where it is a whole section."""
    is_section = path[0] == "deepspeed" or (len(path) == 1 and path[0] in Config.model_fields)
    if not (is_section and isinstance(value, dict)):
        yield path, value
    elif not value:
        name = ".".join(path)
        problem = Problem(f"--set {name}", value, "sets none of its keys", "name those to set")
        raise ConfigError("command line", [problem])
    else:
        for key, inner in value.items():
            yield from single_keys([*path, key], inner)


def follow_moves(raw: dict[str, Any]) -> list[Problem]:
    """Read keys of earlier versions, in place, as what they are called now, and say so.

    Configurations that runs have written name every key, so a value that asks for nothing is
    dropped in silence.
    """
    problems = []
    for old, new in MOVED.items():
        section, _, leaf = old.partition(".")
        place = raw.get(section)
        if not isinstance(place, dict) or leaf not in place:
            continue
        value = place.pop(leaf)
        section, _, leaf = new.partition(".")
        target = raw.setdefault(section, {})
        if value in (None, 0):
            continue
        if not isinstance(target, dict) or target.get(leaf) is not None:
            problems.append(Problem(old, value, f"is {new} now, which is set too", "leave it out"))
            continue
        target[leaf] = value
        logging.getLogger("configs").warning("%s is %s now: read as %s = %r", old, new, new, value)
    return problems


def as_read_today(written: dict[str, Any]) -> Config:
    """The configuration that a run wrote, of an earlier version too: keys that have come since
    have their defaults.

    Raises pydantic's ValidationError for what the schema cannot read.
    """
    raw = copy.deepcopy(written)
    follow_moves(raw)
    return Config.model_validate(raw)


def validate(raw: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """The schema's verdict: the configuration without its mistaken keys, and the mistakes.

    Mistaken keys fall back to their defaults, so that the rules over several keys can still be
    held against all the others and everything is reported in one go.
    """
    raw = copy.deepcopy(raw)
    problems = {problem.key: problem for problem in unusable(raw)}
    filled = False
    while True:
        try:
            return Config.model_validate(raw), list(problems.values())
        except ValidationError as report:
            before = copy.deepcopy(raw)
            for error in report.errors():
                found = list(mistakes(error, before, raw))
                if filled and error["loc"][0] == "model":
                    continue  # what does not fit the shape that was filled in is no mistake
                for problem in found:
                    problems.setdefault(problem.key, problem)
            if any(error["loc"][0] == "model" for error in report.errors()):
                # Only the model has keys without a default; any shape lets the rest be checked.
                given = raw.get("model")
                kept = given if isinstance(given, dict) else {}
                raw["model"] = {**kept, "preset": kept.get("preset") or "14m"}
                filled = True
            if raw == before:  # our own bug, which would loop
                raise AssertionError(f"nothing to take out for {report}") from report


def unusable(raw: dict[str, Any]) -> Iterator[Problem]:
    """Values that no key can use, whatever its type; they are taken out of `raw`."""
    for section, content in list(raw.items()):
        if not isinstance(content, dict):
            continue
        for key, value in list(content.items()):
            name = f"{section}.{key}"
            bounded = not {section, name} & WITHOUT_BOUNDS
            reasons = (out_of_bounds(inner, bounded) for inner in values(value))
            if reason := next(filter(None, reasons), None):
                del content[key]
                yield Problem(name, value, reason, "give a valid value")


def values(value: Any) -> Iterator[Any]:
    """All numbers and texts inside a value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from values(inner)
    else:
        yield value


def out_of_bounds(value: Any, bounded: bool) -> str | None:
    """Why no key can have this number or text; None where one can.

    bounded: whether numbers have to be of a size that training can use.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    if bounded and isinstance(value, int) and abs(value) >= LARGEST:
        return f"out of bounds: whole numbers go up to {LARGEST - 1}"
    if bounded and isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        return "out of bounds: infinity in float32, in which training reckons"
    if bounded and isinstance(value, float) and 0 < abs(value) < SMALLEST_FLOAT:
        return "out of bounds: nothing in float32, in which training reckons"
    if isinstance(value, str) and not value.strip():
        return "is blank"
    if isinstance(value, str) and value.startswith(("~/", "$")):
        return "holds what a shell would replace, which is not done here"
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        return "holds a character that no name or text can have"
    if isinstance(value, str) and any(len(part) > LONGEST_NAME for part in value.split("/")):
        return "longer than a file's name can be"
    return None


def inside(location: Sequence[Any], raw: dict[str, Any]) -> list[str]:
    """The part of a schema error's place that is in the file: without branches of unions."""
    path: list[str] = []
    place: Any = raw
    for part in location:
        if not isinstance(place, dict) or part not in place:
            break
        path.append(str(part))
        place = place[part]
    return path


def remove(path: Sequence[str], raw: dict[str, Any]) -> None:
    """Take the value at `path` out of `raw`, if it is still there."""
    place: Any = raw
    for part in path[:-1]:
        place = place.get(part, {})
    place.pop(path[-1], None)


def mistakes(error: ErrorDetails, given: dict[str, Any], raw: dict[str, Any]) -> Iterator[Problem]:
    """A schema error in the words of a user; what is mistaken is taken out of `raw`.

    given: the configuration that the schema has seen, of which `raw` is a copy.
    """
    cause = error.get("ctx", {}).get("error")
    location = error["loc"]
    path = inside(location, given)
    if isinstance(cause, ConfigError):  # the method's section, which checks itself
        section = raw[cause.source]
        wrong = [problem.key for problem in cause.problems if problem.key in section]
        for key in wrong or list(section):
            del section[key]
        for problem in cause.problems:
            name = f"{cause.source}.{problem.key}"
            yield Problem(name, problem.value, problem.reason, problem.fix or suggest(name))
        return
    missing = error["type"] == "missing" and len(path) == len(location) - 1
    if missing and location[0] == "model":
        if path == ["model"] and given["model"].get("preset") is not None:
            return  # a wrong preset is told, not what it would have filled in
        fix = "give it, or start from a size with model.preset, for example 70m"
        yield Problem(".".join(map(str, location)), None, "missing", fix)
        return
    remove(path, raw)
    # A key of the schema by its own name, also where it comes from a preset or holds a list.
    name = ".".join(map(str, location[:2]))
    yield explain(name if name in {key.name for key in keys()} else ".".join(path), error)


def explain(name: str, error: ErrorDetails) -> Problem:
    """What the schema says of one key."""
    value = error["input"]
    if error["type"] == "extra_forbidden":
        return Problem(name, value, "unknown key", suggest(name))
    known = {key.name: key for key in keys()}
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):  # of a rule of ours, which knows the remedy
        reason, _, fix = str(cause).rpartition("; ")
        return Problem(name, value, reason, fix)
    reason = error["msg"][0].lower() + error["msg"][1:]
    meaning = ""
    if name in known:
        meaning = f" ({known[name].help})"
        branch = len(error["loc"]) > 2 and "|" in known[name].type  # of a union
        if branch or error["type"] == "missing":
            reason = f"expected {known[name].type}"
    return Problem(name, value, reason, f"give a valid value{meaning}")


def suggest(name: str) -> str:
    """The known key nearest to an unknown one."""
    known = [key.name for key in keys()] + list(Config.model_fields)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        leaf = name.rpartition(".")[2]
        by_leaf = {path.rpartition(".")[2]: path for path in known}
        near = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1)]
    return f"did you mean {near[0]}?" if near else "see --help-config for all keys"


@dataclass(frozen=True)
class Key:
    """One key of the configuration, as texts: its dotted name and what is told of it."""

    name: str
    type: str
    default: str
    help: str
    unit: str

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]

    @property
    def meaning(self) -> str:
        return f"{self.help} [{self.unit}]" if self.unit else self.help


def keys() -> Iterator[Key]:
    """Every key, section by section."""
    for section, field in Config.model_fields.items():
        annotation = field.annotation
        if annotation is L2EConfig:
            yield from method_keys(section)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, inner in annotation.model_fields.items():
                yield schema_key(f"{section}.{name}", inner)
        else:
            yield schema_key(section, field)


def method_keys(section: str) -> Iterator[Key]:
    """The keys that the method's own dataclass declares."""
    types = get_type_hints(L2EConfig)
    for field in fields(L2EConfig):
        name, told = f"{section}.{field.name}", field.metadata
        default = json.dumps(field.default)
        yield Key(name, type_name(types[field.name]), default, told["help"], told["unit"])


def schema_key(name: str, field: FieldInfo) -> Key:
    """A key that the schema declares."""
    extra = field.json_schema_extra
    unit = str(extra.get("unit", "")) if isinstance(extra, dict) else ""
    default = "required"
    if not field.is_required():
        default = json.dumps(field.get_default(call_default_factory=True))
    return Key(name, type_name(field.annotation), default, field.description or "", unit)


def help_text() -> str:
    """All keys with type, default, unit and meaning: the text of `--help-config`."""
    lines, section = [], ""
    for key in keys():
        if key.section != section:
            section = key.section
            lines.append(f"\n{section}: {Config.model_fields[section].description}")
        default = key.default if key.default == "required" else f"default {key.default}"
        lines.append(f"  {key.name}  ({key.type}, {default})")
        lines.append(f"      {key.meaning}")
    return "\n".join(lines).lstrip("\n")


def type_name(annotation: Any) -> str:
    """A type as a user would write it."""
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")
