"""One process at a time: a lock file that names its holder.

The kernel keeps the lock (over NFS, the server does) and frees it when its holder dies, so nobody
waits for the dead. The file lies where the work does, is never followed through a link, and is
emptied only by the process that has locked it.
"""

import errno
import fcntl
import os
import socket
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

# What a disk without locks answers.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Held(Exception):
    """Another process has the lock; says which one, where and since when."""


class Lock:
    """`path`, locked from `Lock(path)` to `release` or the end of this process.

    Raises `Held` where another process has it, and OSError where the file can't be opened: a link
    or anything but a file of its own among the reasons.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = _open(path)
        while not self.is_ours():  # its last holder took the file away meanwhile
            os.close(self._file)
            self._file = _open(path)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, holder.encode(), 0)

    def is_ours(self) -> bool:
        """Take the lock; whether it is that of the file which bears the name now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 500, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise Held(holder or "another process") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(self._file)
                raise
            print(
                f"WARNING: the disk of {self.path} keeps no locks ({error.strerror}): see to it "
                "yourself that only one process works there",
                flush=True,
            )
            return True
        return self.is_there()

    def is_there(self) -> bool:
        """Whether the file that bears the name is this lock's: it may have been moved away."""
        try:
            return os.path.samestat(os.fstat(self._file), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def keep(self) -> None:
        """Lock the file that bears the name now, if that is another one.

        Raises as a new lock does: `Held` where another process has it.
        """
        if not self.is_there():
            other = Lock(self.path)
            os.close(self._file)
            self._file = other._file

    def release(self) -> None:
        """Take the file away and let the next one in."""
        if self.is_there():
            self.path.unlink()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _open(path: Path) -> int:
    """A descriptor of a plain file that has this one name; made where it is missing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, which a lock must not be", str(path)) from None
        raise
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(file)
        raise OSError(errno.EEXIST, "is no file of its own, which a lock must be", str(path))
    return file
