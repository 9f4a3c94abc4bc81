"""Shuffled maps on disk: built once a machine, shared by its processes as memory maps.

The process that gets the lock builds into a folder of its own and renames it into place; the
others wait for the lock. It is the machine's own (the disk of the maps may be shared by many),
and the kernel frees it when its holder dies, so that a dead builder's place is taken instead of
waited for. Where machines share the disk, the first to finish wins and the rest use its maps.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.files import sync
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
        with _machine_lock(target, timeout):
            if not target.is_dir():
                _build(target, identity, build)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(target.glob("*.npy"))}


def _build(target: Path, identity: dict, build: Callable[[], Maps]) -> None:
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        for name, array in build().items():
            np.save(partial / f"{name}.npy", array)
            sync(partial / f"{name}.npy")
        (partial / "identity.json").write_text(json.dumps(identity, indent=2))
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another machine was faster
                raise
        sync(target.parent)
    except OSError as error:
        raise Problem(
            "data.cache_dir",
            target.parent,
            f"the shuffled maps can't be written ({error})",
            "free space, or name a folder that can be written",
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _machine_lock(target: Path, timeout: float) -> Iterator[None]:
    """One process of this machine at a time."""
    name = hashlib.sha256(str(target).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"l2e-maps-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / f"{name}.lock").open("a+") as lock:
        _acquire(lock, target, timeout)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _acquire(lock, target: Path, timeout: float) -> None:
    begin, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid = lock.read()
            holder = f"process {pid}" if pid else "another process"
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
