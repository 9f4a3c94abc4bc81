"""What of a folder is corpus: its files, without what programs and data sets keep beside theirs."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from data.formats import TEXT, by_name
from l2e.problems import Problem

PassedOver = dict[str, list[str]]  # reason: names

SYSTEM_NAMES = {"__MACOSX", "thumbs.db", "desktop.ini"}
# What tells of a data set's files but isn't one of them.
COMPANION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog)([._-].*)?"
    r"|dataset_(info|infos|dict)\.json|state\.json|_success|(md5|sha\d+)sums(\.txt)?"
    r"|.*\.(md5|sha1|sha256|crc)",
    re.IGNORECASE,
)
# Copies would be read a second time.
BACKUP = re.compile(r".*~|#.*#|.+\.(bak|backup|orig|old|sw[op]|te?mp)(\.?\d+)?", re.IGNORECASE)
UNFINISHED = re.compile(r".+\.(part|crdownload|download|incomplete|aria2)", re.IGNORECASE)
# What prepare.py writes, maybe into the folder that it reads.
PREPARED = (".bin", ".idx", ".manifest.json", ".subsets", ".rejects.jsonl", ".tokenizer.model")
HUB_STORE = {"blobs", "snapshots", "refs"}  # a hub's cache: snapshots are links into blobs


def files_of(folder: Path) -> tuple[list[Path], PassedOver]:
    """The files below a folder that may be corpus, in order, and what else lies there.

    Links are followed, and what they lead to twice is taken once. Raises ValueError for a broken
    link and for a folder that can't be read.
    """
    passed_over: PassedOver = {}
    found = []
    for path, reason in _walk(folder):
        if reason:
            passed_over.setdefault(reason, []).append(str(path))
        else:
            found.append(path)
    files, beside = sift(sorted(found), {folder})
    return files, passed_over | beside


def found_by_pattern(paths: list[Path]) -> tuple[list[Path], PassedOver]:
    """What may be corpus of what a pattern meets, which nobody named, and the rest.

    A folder stands for what is in it, which `**` meets as well.
    """
    passed_over: PassedOver = {}
    folders = {path for path in paths if path.is_dir()}
    found = []
    for path in paths:
        if reason := _made_by(path.name):
            passed_over.setdefault(reason, []).append(str(path))
        elif folders.isdisjoint(path.parents):
            found.append(path)
    files, beside = sift([path for path in found if path not in folders])
    kept = folders.union(files)
    return [path for path in found if path in kept], passed_over | beside


def sift(found: list[Path], tops: Collection[Path] = ()) -> tuple[list[Path], PassedOver]:
    """The files that may be corpus among those found together, and the others.

    What tells of a data set lies at its top, which are `tops`, or beside records.
    """
    passed_over: PassedOver = {}

    def pass_over(reason: str, path: Path) -> None:
        passed_over.setdefault(reason, []).append(str(path))

    about = {*tops}  # and folders with a file of records in them or below
    for path in found:
        if by_name(path.name)[0] not in ("", TEXT) and not COMPANION.fullmatch(path.name):
            about.update(path.parents)
    files = []
    prepared = {path.with_suffix("") for path in found if path.suffix == ".idx"}
    for path in found:
        if any(path.with_name(path.name.removesuffix(end)) in prepared for end in PREPARED):
            pass_over("prepared already", path)
        elif path.name.endswith(".rejects.jsonl"):
            pass_over("rejects of a preparation", path)
        elif COMPANION.fullmatch(path.name) and path.parent in about:
            pass_over("about the data", path)
        else:
            files.append(path)
    return files, passed_over


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Everything below a folder, with the reason why it is no corpus, or ""."""
    seen = {_identity(folder)}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        store = {"blobs", "refs"} if set(folders) >= HUB_STORE else set()
        entered = []
        for name in sorted(folders):
            path = Path(place, name)
            reason = why_no_corpus(name) or ("the hub's store" if name in store else "")
            if not reason and _identity(path) in seen:
                reason = "the same folder again"
            if reason:
                yield path, reason
            else:
                seen.add(_identity(path))
                entered.append(name)
        folders[:] = entered
        for name in sorted(names):
            path = Path(place, name)
            reason = why_no_corpus(name)
            if not reason and not path.exists():
                raise Problem("input", path, "is a broken link", "mend it, or remove it")
            yield path, reason or ("" if path.is_file() else "no regular file")


def why_no_corpus(name: str) -> str:
    """Why a file or a folder of this name is no corpus, or "", where nobody asked for it."""
    if name.startswith("."):
        return "hidden"
    return _made_by(name)


def _made_by(name: str) -> str:
    """What made a file or a folder of this name that is never corpus, or ""."""
    if name in SYSTEM_NAMES or name.lower() in SYSTEM_NAMES:
        return "of the operating system"
    if BACKUP.fullmatch(name):
        return "an editor's or a program's copy"
    if UNFINISHED.fullmatch(name):
        return "an unfinished download"
    return "an interrupted preparation" if name.endswith(".partial") else ""


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> None:
    raise Problem("input", Path(error.filename), f"can't be read ({error.strerror})", "repair it")


def without_copies(files: list[Path]) -> tuple[list[Path], PassedOver]:
    """The files, each once where several names lead to the same one."""
    seen: dict[tuple[int, int], Path] = {}
    once, again = [], []
    for path in files:
        first = seen.setdefault(_identity(path), path)
        if first is path:
            once.append(path)
        else:
            again.append(f"{path} is {first}")
    return once, {"the same file again": again} if again else {}
