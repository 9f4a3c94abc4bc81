"""Names on the Hugging Face hub: owner/name@revision, with hf: before it where a path may stand."""

from pathlib import Path
from typing import NamedTuple

from l2e.problems import Problem

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


def refuse_escapes(snapshot: Path) -> None:
    """Raise ValueError where a file of a repository's local copy lies outside of that copy.

    The hub's cache has a folder for each repository; its snapshots are links into its `blobs`.
    """
    inner = snapshot.parent.name == "snapshots"
    repository = (snapshot.parent.parent if inner else snapshot).resolve()
    for path in snapshot.rglob("*"):
        if not path.resolve().is_relative_to(repository):
            raise Problem(
                "hub file",
                path,
                f"is a link to {path.resolve()}, outside of its repository's folder {repository}",
                "delete that folder and fetch it again",
            )


def refuse_stray_links(name: str | Path) -> None:
    """`refuse_escapes` of what is here already of a hub id; a folder is taken as it is."""
    repository, revision = parse(name)
    if Path(repository).exists():
        return
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    if isinstance(found, str):
        refuse_escapes(Path(found).parent)
