"""Names of files on the Hugging Face hub, written `hf://owner/name`."""

from __future__ import annotations

PREFIX = "hf://"


def is_hub(path: object) -> bool:
    """Whether a path of the configuration names something on the hub."""
    return isinstance(path, str) and path.startswith(PREFIX)


def repository(path: str) -> str:
    """`owner/name` of `hf://owner/name`."""
    return path.removeprefix(PREFIX)
