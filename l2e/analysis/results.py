"""What an analysis leaves behind: VERB.json with its provenance, beside the figures."""

import json
import math
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy
import scipy
import sklearn
import torch
import transformers


def provenance() -> dict:
    """The command, versions and date that a number in a document must come with."""
    modules = {m.__name__: m.__version__ for m in (torch, transformers, numpy, scipy, sklearn)}
    return {
        "command": "python " + shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU thread(s)",
        "versions": {"python": platform.python_version(), **modules},
    }


def write_result(folder: Path, verb: str, result: dict) -> Path:
    """Write folder/VERB.json with provenance; non-finite numbers become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{verb}.json"
    path.write_text(json.dumps(finite({**result, "provenance": provenance()}), indent=1))
    return path


def read_result(folder: Path, verb: str) -> dict | None:
    path = folder / f"{verb}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def finite(value):
    """The same structure with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
