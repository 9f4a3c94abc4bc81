"""Files that are not taken on trust: through no link, of no other user, running nothing.

What is written beside a result, or kept for the next time, bears a name that anybody can guess. In
a folder that others can write to, a link under that name would lead the writing elsewhere, and a
folder under it would be read as one's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

from l2e.problems import Problem, first_line

if TYPE_CHECKING:
    from torch import Tensor

# Where the weights may be: one file, or an index of several. Safetensors before pickles.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ROOT_USER = 0
OPEN_TO_ALL = stat.S_IWOTH  # of a folder's mode


def create(path: Path) -> BinaryIO:
    """A new file to write, in the place of what bore its name; a link is not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is on the disk.

    Readers see the old one or the new one; where the writing fails nothing of it stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with create(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def keep_umask(path: Path, write: Callable[[], object]) -> None:
    """`write()` the file, which then is as readable as others of the user's; some libraries' are
    their writer's alone."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    write()
    path.chmod(mode)


def no_follow(path: str, flags: int) -> int:
    """An `opener` of `open` that refuses a link under the file's name."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def fresh_folder(parent: Path, prefix: str) -> Path:
    """A new folder in `parent`, whose name begins with `prefix` and is nobody else's.

    As readable as the user's umask says: others may share what it becomes, or may not.
    """
    folder = parent / f"{prefix}{secrets.token_hex(8)}"
    folder.mkdir()
    return folder


def refuse_foreign(key: str, path: Path) -> None:
    """Raise ValueError where what is to be read as one's own is a link, or another user's.

    Taken are one's own, root's, and those of whoever owns the folder around them, who could change
    anything in it; a disk of the network may write down another owner than the one who writes.
    """
    fix = "delete it, or name a folder of your own"
    if path.is_symlink():
        raise Problem(key, path, f"is a link (to {os.readlink(path)}), which is not followed", fix)
    owner = path.stat().st_uid
    if owner not in (os.geteuid(), ROOT_USER, path.parent.stat().st_uid):
        reason = f"belongs to another user (number {owner}), whose work is not taken for yours"
        raise Problem(key, path, reason, fix)


def own_folder(key: str, path: Path) -> None:
    """Make a folder, and those around it that are missing; raises ValueError where another user
    was faster, in a folder where everybody may make some."""
    path.mkdir(parents=True, exist_ok=True)
    if theirs := strangers_folder(path):
        fix = "name a folder of your own"
        raise Problem(key, path, f"{theirs} was made by another user, who may change it", fix)


def strangers_folder(path: Path) -> Path | None:
    """The first on the way to `path` that another user made where everybody may make some.

    Its maker can replace it, also in a sticky folder such as /tmp, where nobody else can.
    """
    path = path.absolute()
    for folder in (*reversed(path.parents), path):
        if not os.path.lexists(folder):
            return None
        around, owner = folder.parent.stat(), folder.lstat().st_uid
        if around.st_mode & OPEN_TO_ALL and owner not in (os.geteuid(), ROOT_USER, around.st_uid):
            return folder
    return None


def inside(folder: Path, name: object, source: Path) -> Path:
    """The file of `folder` that the file `source` names; raises ValueError if that leads out of it.

    Only the name is looked at: what lies in the folder may be a link of the user's own.
    """
    parts = PurePath(name).parts if isinstance(name, str) else ()
    if not parts or "\0" in str(name) or ".." in parts or PurePath(*parts).is_absolute():
        raise Problem(
            "file name",
            source,
            f"names {name!r}, which is no file in {folder}",
            "get an undamaged copy from a source you trust",
        )
    return folder.joinpath(*parts)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are there once each; else the last would win in silence."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def weight_files(folder: Path) -> list[Path]:
    """A Hugging Face folder's weight files: one, or those its index names; [] where it has none.

    What else lies there, such as the parts of an earlier export, is no part of the model.
    """
    for file in WEIGHT_FILES:
        index = folder / f"{file}.index.json"
        if index.is_file():
            paths = [inside(folder, name, index) for name in _files_of(index)]
            missing = [str(path) for path in paths if not path.is_file()]
            if missing:
                raise ValueError(f"{index} names {', '.join(missing)}, not found: fetch them")
            return paths
        if (folder / file).is_file():
            return [folder / file]
    return []


def _files_of(index: Path) -> list[str]:
    """The files that an index says the weights are in."""
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights ({error}): fetch it again") from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, memory-mapped; nothing in it is run.

    Raises ValueError for a damaged file, and for one that holds anything but tensors by name.
    """
    import torch  # seconds, which the other files don't need

    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # an unpickler may fail in any way
        raise ValueError(f"{path} cannot be read ({first_line(error)}): fetch it again") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path} holds something else than tensors by name: fetch it again")
    return tensors
