"""What a configuration names as `hf:owner/name@revision`: files on the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from l2e.hub import parse


def fetch_tokenizer(path: str) -> Path:
    """The local copy of a repository's tokenizer.json."""
    from huggingface_hub import hf_hub_download

    name, revision = parse(path)
    return Path(hf_hub_download(name, "tokenizer.json", revision=revision))


def fetch_tokens(path: str, folder: Path) -> str:
    """The prefix of a local .bin/.idx pair made from a dataset repository's token files.

    Pythia's preshuffled sets come as one .idx and a .bin in numbered parts, which are joined.
    Raises ValueError where the repository has no such files.
    """
    from huggingface_hub import snapshot_download

    name, revision = parse(path)
    patterns = ["*.bin", "*.idx"]
    local = snapshot_download(name, revision=revision, repo_type="dataset", allow_patterns=patterns)
    kept = name if revision is None else f"{name}@{revision}"
    return join_parts(Path(local), folder / kept.replace("/", "--"))


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
        target.parent.mkdir(parents=True, exist_ok=True)
        if len(parts) == 1:
            target.unlink(missing_ok=True)
            target.symlink_to(parts[0].resolve())
        else:
            with target.open("wb") as joined:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, joined, length=2**24)
        done.symlink_to(indexes[0].resolve())
    return str(prefix)
