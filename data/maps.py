"""Shuffled maps on disk: built once a machine, shared by its processes as memory maps.

The process that gets the lock beside them builds into a folder of its own and renames it into
place; the others wait for the lock, which is free again when its holder dies. Where machines share
a disk that keeps no locks, the first to finish wins and the rest use its maps.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.files import sync
from data.lock import Held, Lock
from l2e.files import fresh_folder, own_folder, refuse_foreign
from l2e.problems import Problem

TIMEOUT = 3600.0  # seconds; a full Pile is shuffled in minutes
SILENT_SECONDS = 2.0  # of waiting, before anything is said
Maps = Mapping[str, np.ndarray]


def build_once(
    cache_dir: str | Path | None,
    identity: dict,
    build: Callable[[], Maps],
    timeout: float = TIMEOUT,
) -> Maps:
    """The arrays `build` makes, from `cache_dir` where they are there already.

    Args:
        identity: what the arrays follow from; its hash is their name.
        timeout: seconds to wait for another process that builds them.

    Raises ValueError when the folder can't be written or the builder takes too long.
    """
    if cache_dir is None:
        return build()
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    target = Path(cache_dir).absolute() / name
    if not target.is_dir():
        with _locked(target, timeout):
            if not target.is_dir():
                _build(target, identity, build)
    refuse_foreign("data.cache_dir", target)
    return {path.stem: _read(path) for path in sorted(target.glob("*.npy"))}


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        fix = f"delete the folder {path.parent}: it is made anew"
        raise Problem("shuffled map", path, f"cannot be read ({error})", fix) from error


def _build(target: Path, identity: dict, build: Callable[[], Maps]) -> None:
    partial = None
    try:
        partial = fresh_folder(target.parent, f"{target.name}.partial-")
        for name, array in build().items():
            np.save(partial / f"{name}.npy", array)
            sync(partial / f"{name}.npy")
        (partial / "identity.json").write_text(json.dumps(identity, indent=2))
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another machine was faster
                raise
        sync(target.parent)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(target: Path, timeout: float) -> Iterator[None]:
    """One builder at a time; the others wait here."""
    try:
        own_folder("data.cache_dir", target.parent)
        with _wait(target, timeout):
            yield
    except OSError as error:
        raise Problem(
            "data.cache_dir",
            target.parent,
            f"the shuffled maps can't be written ({error})",
            "free space, or name a folder that can be written",
        ) from error


def _wait(target: Path, timeout: float) -> Lock:
    begin, told = time.monotonic(), False
    while True:
        try:
            return Lock(target.with_name(f"{target.name}.lock"))
        except Held as held:
            holder = str(held)
        waited = time.monotonic() - begin
        if waited > timeout:
            raise Problem(
                "data.cache_dir",
                target.parent,
                f"waited {timeout:g} s for {holder} to build the shuffled maps "
                f"{target.name}; it lives but isn't done",
                "look at it, end it, and start again",
            )
        if not told and waited > SILENT_SECONDS:
            print(f"waiting for {holder} to build the shuffled maps", flush=True)
            told = True
        time.sleep(0.05)
