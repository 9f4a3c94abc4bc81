"""Folders that are either whole or not there: how checkpoints reach the disk.

A checkpoint `step_0000100` is written into `step_0000100.tmp`. When all its files and the list of
them (sizes and SHA-256) are on the disk, the folder is renamed, and only then does the file
`latest` name it. A process killed at any moment leaves the earlier checkpoints as they were.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from data.files import sha256, sync
from l2e.files import create, inside, replacing
from launch.checkpoint.tensorfile import FileRecord

FILES = "files.json"
FILES_BEFORE = "manifest.json"  # its name in checkpoints written before it had one of its own
LATEST = "latest"
FORMAT = 1
# A checkpoint, or one that a new save of the same step was about to replace when it was killed.
STEP_FOLDER = re.compile(r"step_(\d+)(\.replaced)?$")
CHUNK = 1 << 22


def folder_name(step: int) -> str:
    return f"step_{step:07d}"


def begin(final: Path) -> Path:
    """An empty folder beside `final` to write into; what a killed save left there is removed.

    Raises:
        ValueError: the folder cannot be written.
    """
    temporary = final.with_name(final.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(cannot_write(temporary, error)) from None
    return temporary


def write_text(path: Path, text: str) -> FileRecord:
    """Write a small file to the disk."""
    data = text.encode()
    with create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a file to the disk, hashed on the way."""
    digest, size = hashlib.sha256(), 0
    with open(source, "rb", buffering=0) as old, open(target, "wb") as new:
        while chunk := old.read(CHUNK):
            new.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        new.flush()
        os.fsync(new.fileno())
    return FileRecord(size, digest.hexdigest())


def commit(temporary: Path, final: Path, records: Mapping[str, FileRecord]) -> None:
    """Make `temporary` the checkpoint `final`. Every file in it must be on the disk already."""
    files = {name: asdict(record) for name, record in sorted(records.items())}
    write_text(temporary / FILES, json.dumps({"format": FORMAT, "files": files}, indent=1))
    sync(temporary)
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def point_latest(final: Path) -> None:
    """Let the file `latest` beside `final` name it."""
    with replacing(final.with_name(LATEST)) as file:
        file.write(f"{final.name}\n".encode())
    sync(final.parent)


def cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write the checkpoint {path}: {error.strerror} (errno {error.errno}). Earlier "
        "checkpoints are untouched. Free space or make the folder writable, then resume with "
        "`--resume auto`"
    )


def file_list(folder: Path) -> Path | None:
    """The list of a checkpoint's files, with which it is finished; None where there is none."""
    return next(
        (folder / name for name in (FILES, FILES_BEFORE) if (folder / name).is_file()), None
    )


def read_records(folder: Path) -> dict[str, FileRecord]:
    """File name -> record of a finished checkpoint.

    Raises:
        ValueError: no list of files, or not one.
    """
    path = file_list(folder)
    if path is None:
        raise ValueError(
            f"{folder} is no finished checkpoint: {FILES} is missing (a save that was "
            "interrupted, or another kind of folder)"
        )
    try:
        listed = json.loads(path.read_bytes())
        files = {name: FileRecord(**record) for name, record in listed["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if listed.get("format") != FORMAT:
        raise ValueError(f"{path}: format {listed.get('format')}, this version reads {FORMAT}")
    for name in files:
        inside(folder, name, path)
    return files


def damage(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint's files (those of `names`; default: all); [] if intact."""
    try:
        records = read_records(folder)
    except ValueError as error:
        return [str(error)]
    found = []
    for name in records if names is None else names:
        path, record = folder / name, records[name]
        if not path.is_file():
            found.append(f"{path} is missing{unlisted(folder, records)}")
        elif path.stat().st_size != record.bytes:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {record.bytes}")
        elif sha256(path) != record.sha256:
            found.append(f"{path} has changed: its SHA-256 is not the one that was written")
    return found


def unlisted(folder: Path, records: Mapping[str, FileRecord]) -> str:
    known = {*records, FILES, FILES_BEFORE}
    extra = sorted({path.name for path in folder.iterdir()} - known)
    return f" (in its place, unlisted: {', '.join(extra)})" if extra else ""


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in `folder`, newest first, intact or not."""
    if not folder.is_dir():
        return []
    found = {path: match for path in folder.iterdir() if (match := STEP_FOLDER.match(path.name))}
    # Of a checkpoint and the one it was about to replace, the newer comes first.
    return sorted(found, key=lambda path: (-int(found[path][1]), path.name))


def latest(folder: Path) -> str | None:
    """The name of the checkpoint that the file `latest` names; None where it names none."""
    try:
        name = (folder / LATEST).read_text("utf-8", errors="replace").strip()
    except OSError:
        return None
    return name if STEP_FOLDER.fullmatch(name) and (folder / name).is_dir() else None


def current(folder: Path) -> list[Path]:
    """Checkpoints of the run as it stands, newest first: the one `latest` names and earlier ones.

    All of them where `latest` names none: it is missing or damaged, or a save was killed while it
    replaced the one that is named.
    """
    found, name = checkpoints(folder), latest(folder)
    if name is None:
        return found
    return found[[path.name for path in found].index(name) :]


def step_of(folder: Path) -> int:
    match = STEP_FOLDER.match(folder.name)
    if not match:
        raise ValueError(f"{folder} is not named like a checkpoint (step_0000100)")
    return int(match[1])


def prune(
    folder: Path, keep_last: int, keep_every: int, keep_steps: Collection[int] = ()
) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those that are kept for good.

    These are of every `keep_every`-th step and of `keep_steps`. 0 switches a rule off; with
    `keep_last` 0 no checkpoint is deleted. The one `latest` names stays. What killed saves left
    behind goes too. Returns the deleted checkpoints.

    Raises:
        OSError: something could not be deleted; everything else was.
    """
    failures: list[OSError] = []
    for leftover in folder.glob("step_*.tmp"):
        with noted(failures):
            shutil.rmtree(leftover)
    named = latest(folder)

    def kept_for_good(step: int) -> bool:
        return step in keep_steps or (keep_every > 0 and step % keep_every == 0)

    old = [
        path
        for path in checkpoints(folder)[keep_last:]
        if keep_last and path.name != named and not kept_for_good(step_of(path))
    ]
    for path in old:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = path.with_name(path.name + ".tmp")
        with noted(failures):
            path.rename(doomed)
            shutil.rmtree(doomed)
    if failures:
        raise failures[0]
    return old


@contextmanager
def noted(failures: list[OSError]) -> Iterator[None]:
    """Go on after a failing disk, which is told later."""
    try:
        yield
    except OSError as error:
        failures.append(error)
