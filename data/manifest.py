"""PREFIX.manifest.json: what a prepared corpus was made from, and what it holds."""

import json
from pathlib import Path


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
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest {file}: cannot be read ({error}); prepare anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"manifest {file}: is no JSON object; prepare the corpus anew")
    return content


def recorded(prefix: str | Path, key: str) -> str | None:
    """One entry of the manifest, None where there is no manifest."""
    return (read(prefix) or {}).get(key)
