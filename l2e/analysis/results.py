"""What comes with an analysis's numbers in its JSON file."""

import math
import platform
import shlex
import sys
from datetime import UTC, datetime

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


def finite(value):
    """The same structure with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
