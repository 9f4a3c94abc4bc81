"""What a configuration names as `hf:owner/name@revision`: files on the Hugging Face hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l2e.files import create, own_folder
from l2e.hub import parse, refuse_escapes
from l2e.problems import Problem, first_line


@contextmanager
def fetching(what: str, name: str) -> Iterator[None]:
    """Tell a failing download as what it means to a user, a ValueError."""
    try:
        yield
    except Exception as error:  # of the hub's client and of the network below it, many kinds
        reason = f"cannot be fetched from the hub ({first_line(error)})"
        fix = (
            "check the name and the connection (a private or gated repository needs HF_TOKEN), "
            "or name files of this machine"
        )
        raise Problem(what, name, reason, fix) from error


def fetch_tokenizer(path: str) -> Path:
    """The local copy of a repository's tokenizer.json. Raises ValueError where there is none."""
    from huggingface_hub import hf_hub_download

    name, revision = parse(path)
    with fetching("tokenizer", path):
        file = Path(hf_hub_download(name, "tokenizer.json", revision=revision))
    refuse_escapes(file.parent)
    return file


def fetch_tokens(path: str, folder: Path) -> str:
    """The prefix of a local .bin/.idx pair made from a dataset repository's token files.

    Pythia's preshuffled sets come as one .idx and a .bin in numbered parts, which are joined.
    Raises ValueError where the repository has no such files, or can't be reached.
    """
    from huggingface_hub import snapshot_download

    name, revision = parse(path)
    patterns = ["*.bin", "*.idx"]
    with fetching("data.path", path):
        local = snapshot_download(
            name, revision=revision, repo_type="dataset", allow_patterns=patterns
        )
    refuse_escapes(Path(local))
    kept = name if revision is None else f"{name}@{revision}"
    return join_parts(Path(local), folder / kept.replace("/", "--"))


def link(name: Path, target: Path) -> None:
    """Let `name` stand for a file of the hub's cache."""
    name.unlink(missing_ok=True)
    name.symlink_to(target.resolve())


def join_parts(source: Path, prefix: Path) -> str:
    """Join `source`'s .bin parts, in the order of their names, beside its .idx under `prefix`."""
    parts, indexes = sorted(source.rglob("*.bin")), sorted(source.rglob("*.idx"))
    if not parts or len(indexes) != 1:
        raise ValueError(
            f"data.path: {source} holds {len(parts)} .bin and {len(indexes)} .idx files; expected "
            "one .idx and its .bin (in one or several parts)"
        )
    target, done = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if not done.exists():  # the index is linked last: it says that the tokens are whole
        own_folder("data.cache_dir", target.parent)
        if len(parts) == 1:
            link(target, parts[0])
        else:
            with create(target) as joined:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, joined, length=2**24)
        link(done, indexes[0])
    return str(prefix)
