"""A preparation in the making: the folder PREFIX.partial, which can be left and taken up again.

What is in `state.json` is on the disk for good; whatever was written after it is cut off when
the work goes on. So a process may die at any moment, and the result is the same to the byte.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from data.files import sync, write_json
from data.lock import Held, Lock
from data.records import Reject
from l2e.files import no_follow, refuse_foreign
from l2e.problems import Problem

TOKENS, LENGTHS, SUBSETS, REJECTS = "tokens", "lengths", "subsets", "rejects.jsonl"
MANIFEST = "manifest.json"  # written last: all the rest is then on the disk
# What is kept of the work so far, beside what is kept of each file.
PROGRESS = (
    *("units", "text_bytes", "documents", "tokens", "reasons", "subsets"),
    *("said", "inside", "spaces", "example"),
)


@dataclass
class Given:
    """What a source gave: documents, rejects, and why the first of these is none."""

    documents: int = 0
    rejects: int = 0
    reason: str = ""

    @property
    def units(self) -> int:
        return self.documents + self.rejects

    def add(self, more: "Given") -> None:
        self.documents += more.documents
        self.rejects += more.rejects
        self.reason = self.reason or more.reason


class PartialCorpus:
    """Tokens, lengths and subsets of the documents so far, and how far the sources are read.

    `job` says what is being prepared; a folder left by another job is refused. Raises ValueError
    for that, for a folder in use, and for a disk that is full.
    """

    def __init__(self, folder: Path, job: dict):
        self.folder = folder
        self._clear()
        self._job = job
        self._files: dict = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_foreign("output", folder)
            self._lock = Lock(folder / "lock")
            sizes = self._restore()
            if not self.finished:
                for name in (TOKENS, LENGTHS, SUBSETS, REJECTS):
                    self._files[name] = self._open(folder / name, sizes.get(name, 0))
        except Held as held:
            reason = f"another process is preparing it ({held})"
            raise Problem("output", folder, reason, "wait for it, or end it") from None
        except OSError as error:
            reason = f"can't be written ({error})"
            raise Problem("output", folder, reason, "choose another --output") from error

    def _clear(self) -> None:
        self.units = self.text_bytes = self.documents = self.tokens = 0
        self.reasons: Counter[str] = Counter()
        self.subsets: dict[str, list[int]] = {}  # name: [number, documents, tokens]
        self.files: dict[int, Given] = {}  # by the source's number
        self.said: Counter[str] = Counter()  # see `data.wording.COUNTS`
        self.inside: Counter[str] = Counter()  # end-of-text tokens written out in texts
        self.spaces: dict[str, str] = {}  # kind of space: an example of its loss, "" if it is kept
        self.example = ""  # of a text with something that has no token

    def start_anew(self) -> None:
        """Forget what an earlier process did."""
        self._clear()
        (self.folder / "state.json").unlink(missing_ok=True)
        for file in self._files.values():
            file.truncate(0)
            file.seek(0)

    @property
    def finished(self) -> bool:
        """Whether only the renaming of the files is left to do."""
        return (self.folder / MANIFEST).exists()

    def _open(self, path: Path, size: int):
        """Open a file to go on after its first `size` bytes."""
        file = open(path, "ab", opener=no_follow)  # noqa: SIM115 - kept open
        found = file.seek(0, os.SEEK_END)
        if found < size:
            file.close()
            raise Problem(
                "interrupted preparation",
                path,
                f"has {found} bytes, {size} were written",
                f"delete the folder {self.folder} and start anew",
            )
        file.truncate(size)
        file.seek(size)
        return file

    def _restore(self) -> dict[str, int]:
        """Take up the state of an earlier process, if there is one; the size of each file."""
        path = self.folder / "state.json"
        if not path.exists():
            return {}
        try:
            state = json.loads(path.read_text("utf-8"))
            found = state["job"], state["progress"], state["sizes"]
            assert all(isinstance(part, dict) for part in found)
        except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
            reason = f"cannot be read ({error!r})"
            fix = f"delete the folder {self.folder} and start anew"
            raise Problem("interrupted preparation", path, reason, fix) from error
        if state["job"] != self._job:
            changed = [key for key in self._job if state["job"].get(key) != self._job[key]]
            raise Problem(
                "output",
                self.folder,
                f"holds an interrupted preparation that differs in {', '.join(changed)}",
                "delete the folder, or choose another --output",
            )
        for key in PROGRESS:
            setattr(self, key, state["progress"][key])
        for key in ("reasons", "said", "inside"):
            setattr(self, key, Counter(getattr(self, key)))
        self.files = {int(n): Given(**given) for n, given in state["progress"]["files"].items()}
        print(f"continuing after {self.documents:,} documents, {self.tokens:,} tokens", flush=True)
        return state["sizes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()
        self._lock.release()

    @property
    def rejects(self) -> int:
        return self.reasons.total()

    def given(self, number: int) -> Given:
        """What a source has given so far, by its number."""
        return self.files.setdefault(number, Given())

    def add(
        self, tokens: np.ndarray, lengths: list[int], subsets: list[str], rejects: list[Reject]
    ) -> None:
        """Append documents, laid end to end in `tokens`, and the units that weren't any."""
        numbers = []
        for subset, length in zip(subsets, lengths, strict=True):
            counts = self.subsets.setdefault(subset, [len(self.subsets), 0, 0])
            counts[1] += 1
            counts[2] += length
            numbers.append(counts[0])
        self._files[TOKENS].write(tokens)
        self._files[LENGTHS].write(np.array(lengths, np.int32))
        self._files[SUBSETS].write(np.array(numbers, np.int32))
        for reject in rejects:
            line = json.dumps(reject._asdict(), ensure_ascii=True) + "\n"
            self._files[REJECTS].write(line.encode())
            self.reasons[reject.reason.split(":")[0].split(" at ")[0]] += 1
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def append(self, name: str, content: bytes | memoryview | np.ndarray) -> None:
        """More of one of the files; the counts are the caller's."""
        self._files[name].write(content)

    def commit(self) -> None:
        """Make everything so far survive the death of the process."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        files = {number: asdict(given) for number, given in self.files.items()}
        write_json(
            self.folder / "state.json",
            {
                "job": self._job,
                "progress": {**{key: getattr(self, key) for key in PROGRESS}, "files": files},
                "sizes": {name: file.tell() for name, file in self._files.items()},
            },
        )

    @property
    def committed(self) -> bool:
        return (self.folder / "state.json").exists()

    def keep_rejects(self, target: Path) -> None:
        """Put the rejects where the user finds them, if there are any."""
        self._files[REJECTS].flush()
        if self.rejects:
            shutil.copyfile(self.folder / REJECTS, target)
            sync(target)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
