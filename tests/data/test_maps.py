"""Shuffled maps: built once by many processes, and nobody waits for the dead."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from data.maps import build_once

IDENTITY = {"seed": 1}
SPAWN = multiprocessing.get_context("spawn")


def arrays() -> dict[str, np.ndarray]:
    return {"first": np.arange(5), "second": np.ones(3)}


def _build_and_note(folder, barrier, built, found) -> None:
    def build():
        with built.get_lock():
            built.value += 1
        time.sleep(0.2)  # long enough for the others to arrive
        return arrays()

    barrier.wait()
    found.put(build_once(folder, IDENTITY, build)["first"].tolist())


def test_many_processes_build_once(tmp_path):
    barrier, built, found = SPAWN.Barrier(3), SPAWN.Value("i", 0), SPAWN.Queue()
    arguments = (tmp_path, barrier, built, found)
    processes = [SPAWN.Process(target=_build_and_note, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert results == [[0, 1, 2, 3, 4]] * 3
    assert built.value == 1
    assert not list(tmp_path.glob("*partial*"))


def _build_forever(folder, started) -> None:
    def build():
        started.set()
        signal.pause()

    build_once(folder, IDENTITY, build)


@pytest.fixture
def stuck_builder(tmp_path):
    started = SPAWN.Event()
    process = SPAWN.Process(target=_build_forever, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_dead_builders_place_is_taken(tmp_path, stuck_builder):
    os.kill(stuck_builder.pid, signal.SIGKILL)
    stuck_builder.join()
    start = time.monotonic()
    np.testing.assert_array_equal(build_once(tmp_path, IDENTITY, arrays)["second"], np.ones(3))
    assert time.monotonic() - start < 5


def test_a_stuck_builder_is_named_in_time(tmp_path, stuck_builder, capsys, monkeypatch):
    monkeypatch.setattr("data.maps.SILENT_SECONDS", 0.1)
    with pytest.raises(ValueError, match=f"waited 0.2 s for process {stuck_builder.pid}"):
        build_once(tmp_path, IDENTITY, arrays, timeout=0.2)
    assert f"waiting for process {stuck_builder.pid}" in capsys.readouterr().out


def test_another_machine_may_have_been_faster(tmp_path):
    """Machines that share the disk don't share the lock: the first result stays."""

    def build():
        other = {"first": np.arange(5), "second": np.ones(3)}
        target = next(iter(tmp_path.glob("*.partial-*")))
        final = tmp_path / target.name.split(".")[0]
        final.mkdir()
        for name, array in other.items():
            np.save(final / f"{name}.npy", array)
        return arrays()

    assert set(build_once(tmp_path, IDENTITY, build)) == {"first", "second"}
    assert len(list(tmp_path.iterdir())) == 1


def test_other_identities_have_other_maps(tmp_path):
    build_once(tmp_path, {"seed": 1}, arrays)
    other = build_once(tmp_path, {"seed": 2}, lambda: {"first": np.zeros(2)})
    assert set(other) == {"first"}
    assert set(build_once(tmp_path, {"seed": 1}, pytest.fail)) == {"first", "second"}


def test_a_folder_that_cant_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir .* can't be written"):
        build_once(tmp_path / "file" / "cache", IDENTITY, arrays)


def test_a_failing_build_leaves_nothing(tmp_path):
    def build():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build_once(tmp_path, IDENTITY, build)
    assert not list(tmp_path.iterdir())
