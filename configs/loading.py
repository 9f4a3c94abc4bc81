"""Read a configuration file, apply overrides, and report every mistake in it at once."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.checks import cross_check
from configs.schema import Config
from l2e.problems import ConfigError, Problem


def load(path: str | Path, overrides: Sequence[str] = (), processes: int | None = None) -> Config:
    """The checked configuration in `path`.

    overrides: `a.b=c` each; the value is read as JSON where it parses, as text elsewhere.
    processes: ranks of this run; default: the file's own `parallel.processes`, or 1.
    Raises ConfigError, a ValueError, that lists every mistake.
    """
    raw = override(read(Path(path)), overrides)
    config, problems = validate(raw)
    mistaken = {problem.key for problem in problems}
    problems += [p for p in cross_check(config, processes) if p.key not in mistaken]
    if problems:
        raise ConfigError(str(path), problems)
    return config


def read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; a ConfigError where there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(str(p) for p in Path(__file__).parent.glob("*.json"))
        fix = f"give an existing file, for example one of {', '.join(known)}"
        raise ConfigError(str(path), [Problem("--config", path, "no such file", fix)]) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        problem = Problem("--config", path, f"not readable as JSON ({error})", "mend the file")
        raise ConfigError(str(path), [problem]) from None
    if not isinstance(raw, dict):
        problem = Problem("--config", raw, "not a JSON object", "write sections in { }")
        raise ConfigError(str(path), [problem])
    return raw


def override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `a.b=c` put in place."""
    raw = copy.deepcopy(raw)
    for assignment in overrides:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            problem = Problem("--set", assignment, "no 'key=value'", "write --set train.steps=100")
            raise ConfigError("command line", [problem])
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *sections, leaf = name.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                problem = Problem(
                    "--set", assignment, f"{section} is no section", "see --help-config"
                )
                raise ConfigError("command line", [problem])
        place[leaf] = value
    return raw


def validate(raw: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """The schema's verdict: the configuration without its mistaken keys, and the mistakes.

    Mistaken keys fall back to their defaults, so that the rules over several keys can still be
    held against all the others and everything is reported in one go.
    """
    raw = copy.deepcopy(raw)
    problems: dict[str, Problem] = {}
    while True:
        try:
            return Config.model_validate(raw), list(problems.values())
        except ValidationError as report:
            for error in report.errors():
                if error["type"] == "missing":
                    name = ".".join(str(part) for part in error["loc"])
                else:
                    name = ".".join(remove(raw, error["loc"]))
                problem = explain(name, error)
                problems.setdefault(problem.key, problem)
            if "model" in report_sections(report):
                # Only the model has keys without a default; any shape lets the rest be checked.
                given = raw.get("model")
                raw["model"] = {"preset": "14m"} | (given if isinstance(given, dict) else {})


def report_sections(report: ValidationError) -> set[Any]:
    """The sections that a schema report complains about."""
    return {error["loc"][0] for error in report.errors()}


def remove(raw: dict[str, Any], location: Sequence[Any]) -> list[str]:
    """Take the value at `location` out of `raw`; its path, without the schema's union branches."""
    path: list[str] = []
    place: Any = raw
    for part in location:
        if not isinstance(place, dict) or part not in place:
            break
        path.append(str(part))
        parent, place = place, place[part]
    assert path, f"the schema refuses {location}, which is not in the file"
    del parent[path[-1]]
    return path


def explain(name: str, error: Any) -> Problem:
    """A schema error in the words of a user."""
    value = error["input"]
    if error["type"] == "extra_forbidden":
        return Problem(name, value, "unknown key", suggest(name))
    if error["type"] == "missing":
        fix = "give it, or start from a size with model.preset, for example 70m"
        return Problem(name, None, "missing", fix)
    field = dict(keys()).get(name)
    reason = error["msg"][0].lower() + error["msg"][1:]
    meaning = f" ({field.description})" if field is not None and field.description else ""
    return Problem(name, value, reason, f"give a valid value{meaning}")


def suggest(name: str) -> str:
    """The known key nearest to an unknown one."""
    known = [path for path, _ in keys()] + list(Config.model_fields)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        leaf = name.rpartition(".")[2]
        by_leaf = {path.rpartition(".")[2]: path for path in known}
        near = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1)]
    return f"did you mean {near[0]}?" if near else "see --help-config for all keys"


def keys() -> Iterator[tuple[str, Any]]:
    """Every key as (dotted name, its field)."""
    for section, field in Config.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, inner in annotation.model_fields.items():
                yield f"{section}.{name}", inner
        else:
            yield section, field


def help_text() -> str:
    """All keys with type, default, unit and meaning: the text of `--help-config`."""
    lines = []
    section = ""
    for name, field in keys():
        head, _, _ = name.partition(".")
        if head != section:
            section = head
            lines.append(f"\n{section}: {Config.model_fields[section].description}")
        unit = (field.json_schema_extra or {}).get("unit", "")
        default = default_text(field)
        lines.append(f"  {name}  ({type_name(field.annotation)}, {default})")
        lines.append(f"      {field.description}{f' [{unit}]' if unit else ''}")
    return "\n".join(lines).lstrip("\n")


def default_text(field: Any) -> str:
    """A key's default in words."""
    if field.is_required():
        return "required"
    return f"default {json.dumps(field.get_default(call_default_factory=True))}"


def type_name(annotation: Any) -> str:
    """A type as a user would write it."""
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")
