"""Names on the Hugging Face hub: owner/name@revision, with hf: before it where a path may stand."""

from pathlib import Path
from typing import NamedTuple

PREFIX = "hf:"


class HubName(NamedTuple):
    """What is meant on the hub; of `revision` None the newest."""

    repository: str
    revision: str | None


def is_hub(name: object) -> bool:
    """Whether a value that may be a path names something on the hub."""
    return isinstance(name, str) and name.startswith(PREFIX)


def parse(name: str | Path) -> HubName:
    """`owner/name` or `owner/name@revision`, the prefix before it or not.

    A folder that exists is its own name, whatever it is called: the hub's clients take both.
    """
    text = str(name).removeprefix(PREFIX)
    if Path(text).exists() or "@" not in text:
        return HubName(text, None)
    repository, _, revision = text.rpartition("@")
    return HubName(repository, revision)
