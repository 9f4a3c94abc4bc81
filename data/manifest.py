"""PREFIX.manifest.json: what a prepared corpus was made from, and what it holds."""

import json
from pathlib import Path

from data.problem import Problem

# What other parts of the code rely on.
REQUIRED = {
    "documents": int,
    "tokens": int,
    "text_bytes": int,
    "subsets": dict,
    "rejects": dict,
    "bin_sha256": str,
    "idx_sha256": str,
    "tokenizer_path": str,
    "tokenizer_sha256": str,
    "job": dict,
}


def path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def read(prefix: str | Path) -> dict | None:
    """The manifest, or None for token files that another tool made.

    Raises ValueError for a damaged one.
    """
    file = path(prefix)
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read ({error})"
        raise Problem("manifest", file, reason, "copy or prepare the corpus anew") from error
    if not isinstance(content, dict):
        raise Problem("manifest", file, "is no JSON object", "copy or prepare the corpus anew")
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind):
            reason = f"has no {key!r}, or not as {kind.__name__}"
            raise Problem("manifest", file, reason, "copy or prepare the corpus anew")
    return content


def recorded(prefix: str | Path, key: str) -> str | None:
    """One entry of the manifest, None where there is no manifest."""
    return (read(prefix) or {}).get(key)
