"""Files that appear whole or not at all."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from l2e.files import replacing
from l2e.problems import Problem


def sha256(path: Path) -> str:
    """Hash of a whole file, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_spans(path: Path, spans: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
    """Hash of bytes [start, stop) of a file, spans that follow one another, and of each of them."""
    whole, parts = hashlib.sha256(), []
    for span in spans:
        part = hashlib.sha256()
        for chunk in chunks(path, *span):
            whole.update(chunk)
            part.update(chunk)
        parts.append(part.hexdigest())
    return whole.hexdigest(), parts


def chunks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a file, a MiB at a time."""
    with path.open("rb") as stream:
        stream.seek(start)
        while start < stop and (chunk := stream.read(min(2**20, stop - start))):
            yield chunk
            start += len(chunk)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step: readers see the old one or the new one."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The object in a JSON file; None where it is missing, or damaged, which `say` is told.

    For files that only inform: whoever can't do without one reads it otherwise.
    """
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
        reason = "no JSON object"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    say(f"{path} cannot be read and is passed over ({reason})")
    return None


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old one or the new one."""
    with replacing(path) as file:
        file.write(text.encode())
    sync(path.parent)


class Unchanged:
    """A file that is to stay as it was when this was made.

    One that is replaced by another under its name does; one that is written to does not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")
        self.before = self.look()

    def look(self) -> tuple[int, int]:
        """Size in bytes, and when it was last written to."""
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """After something was read. Raises ValueError if the file has been written to."""
        if self.look() != self.before:
            raise Problem(
                "token file",
                self.path,
                f"was written to while it was read ({self.before[0]:,} bytes when it was opened, "
                f"{self.look()[0]:,} now)",
                "put it back as it was; the run goes on from its newest checkpoint by "
                "--resume auto",
            )
