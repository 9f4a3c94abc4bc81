"""One process at a time, by a lock that names its holder and touches no other file."""

import multiprocessing
import os
import signal
import socket

import pytest

from data.lock import Held, Lock

SPAWN = multiprocessing.get_context("spawn")


def test_the_second_is_told_who_has_it(tmp_path):
    path = tmp_path / "lock"
    with Lock(path), pytest.raises(Held) as held:
        Lock(path)
    assert f"process {os.getpid()} on {socket.gethostname()} since 20" in str(held.value)
    assert not path.exists()
    Lock(path).release()


def _hold(path, taken) -> None:
    Lock(path)
    taken.set()
    signal.pause()


def test_the_dead_hold_nothing(tmp_path):
    path, taken = tmp_path / "lock", SPAWN.Event()
    holder = SPAWN.Process(target=_hold, args=(path, taken))
    holder.start()
    assert taken.wait(60)
    with pytest.raises(Held, match=f"process {holder.pid} "):
        Lock(path)
    holder.kill()
    holder.join()
    with Lock(path):
        assert str(os.getpid()) in path.read_text()


def test_a_lock_whose_folder_was_moved_takes_no_others_away(tmp_path):
    path = tmp_path / "run" / "lock"
    path.parent.mkdir()
    first = Lock(path)
    path.parent.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        first.keep()
    path.parent.mkdir()
    first.keep()  # anew, where the name leads now
    with pytest.raises(Held):
        Lock(path)
    path.parent.rename(tmp_path / "moved again")
    path.parent.mkdir()
    with Lock(path):
        with pytest.raises(Held, match=f"process {os.getpid()}"):
            first.keep()
        first.release()
        with pytest.raises(Held):
            Lock(path)
    assert (tmp_path / "moved again" / "lock").exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "folder", "pipe"])
def test_nothing_but_a_file_of_its_own_is_taken(tmp_path, kind):
    other, path = tmp_path / "other", tmp_path / "lock"
    other.write_text("precious")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "hard link":
        path.hardlink_to(other)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(OSError, match="lock"):
        Lock(path)
    assert other.read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_a_file_that_its_holder_took_away_is_made_anew(tmp_path, monkeypatch):
    """The next one has opened the file when its holder removes it."""
    path = tmp_path / "lock"
    first = Lock(path)
    original = Lock.is_ours

    def late(self):
        monkeypatch.setattr(Lock, "is_ours", original)
        first.release()
        return original(self)

    monkeypatch.setattr(Lock, "is_ours", late)
    second = Lock(path)
    assert path.exists()
    with pytest.raises(Held):
        Lock(path)
    second.release()


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    Lock(tmp_path / "lock").release()
    assert "keeps no locks (Function not implemented)" in capsys.readouterr().out
