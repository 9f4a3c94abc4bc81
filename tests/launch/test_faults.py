"""What becomes of a run when ranks die, hang or are told to leave. docs/operations.md lists it.

One kill and one hang are in `make test`; the rest takes minutes (`make test-cluster`).
"""

import ctypes
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from data.lock import Lock
from launch.engine.signals import STOPPING
from tests.launch import fleet
from tests.launch.fleet import ranks, started, wait_for, wait_for_end, wait_for_step, words
from tests.launch.models import byte_tokenizer, write_sciq
from tests.launch.running import ROOT, free_port

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return fleet.write_config(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.cluster)])
def test_a_killed_rank_takes_the_others_along(config: Path, tmp_path: Path, victim: int) -> None:
    """Any rank: the first one, which the others watch through, is no exception."""
    run = tmp_path / "run"
    few = words({"train.global_batch_size": 3})
    with ranks(3, config, run, *few, logs=tmp_path / "logs") as members:
        wait_for_step(run, 8, *members)
        members[victim].process.send_signal(signal.SIGKILL)
        check_others(members, victim, run)


def check_others(members: list[fleet.Member], victim: int, run: Path) -> None:
    """Within a minute they leave; the last line names the rank, its host, step and checkpoint."""
    others = [member for rank, member in enumerate(members) if rank != victim]
    wait_for_end(others, 60)
    for member in others:
        assert member.process.returncode == 1
        last = member.last_line()
        assert re.search(rf"rank {victim} on {HOST} died in step \d+;", last), member.output()
        assert f"step_{fleet.newest(run):07d}" in last


# A rank that kills itself at a place of the program, once there is a checkpoint.
AIMED = """
import os, signal, sys
from pathlib import Path
sys.path[0] = {root!r}
from launch.engine.signals import STOP
STOP.listen()
from launch import cli, pretrain
from launch.checkpoint.tensorfile import TensorFile
from launch.engine.engine import WholeModelEngine
from torch.optim import AdamW

def die(*_):
    if os.environ["RANK"] == "1" and Path({run!r}, "checkpoints", "latest").exists():
        os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name):
    inner = getattr(owner, name)
    def outer(*given, **named):
        die()
        return inner(*given, **named)
    setattr(owner, name, outer)

def hooked(engine, batch):
    if not engine.__dict__.setdefault("hooks", []):
        parameter = engine.model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight
        engine.hooks.append(parameter.register_hook(die))
    return split(engine, batch)

split = WholeModelEngine.split
place = {place!r}
if place == "backward":
    WholeModelEngine.split = hooked
elif place == "forward":
    from model.mlp import MLP
    before(MLP, "forward")
else:
    owner = {{"step": AdamW, "save": TensorFile, "evaluation": WholeModelEngine}}[place]
    before(owner, {{"save": "write", "evaluation": "evaluate"}}.get(place, "step"))
cli.run_verb(pretrain.main)
"""


@pytest.mark.cluster
@pytest.mark.parametrize("place", ["forward", "backward", "step", "save", "evaluation"])
def test_a_rank_is_killed_wherever_it_is(config: Path, tmp_path: Path, place: str) -> None:
    run, program = tmp_path / "run", tmp_path / "aimed.py"
    program.write_text(AIMED.format(root=str(ROOT), run=str(run), place=place))
    few = words({"evaluate.interval": 3})
    with ranks(2, config, run, *few, logs=tmp_path / "logs", program=program) as members:
        wait_for_end(members[1:], 120)
        assert members[1].process.returncode == -signal.SIGKILL, members[1].output()
        check_others(members, 1, run)
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert ("step_0000010.tmp" in found) == (place == "save")
    assert "step_0000005" in found


# A rank that is told to leave while downstream tasks are scored; it would take an hour.
SCORING = """
import os, signal, sys, time
sys.path[0] = {root!r}
from launch.engine.signals import STOP
STOP.listen()
from launch import cli, pretrain
from launch.evaluation import scores

def told_to_leave(*_):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.{signal})
    time.sleep(3600)

scores.evaluate = told_to_leave
cli.run_verb(pretrain.main)
"""


@pytest.mark.cluster
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_while_tasks_are_scored(
    config: Path, tmp_path: Path, name: str, status: int
) -> None:
    """The step was saved before the scoring began: all leave at once, and it is the newest."""
    run, program = tmp_path / "run", tmp_path / "scoring.py"
    program.write_text(SCORING.format(root=str(ROOT), signal=name))
    settings = {
        "model.vocab_size": 300,
        "tokenizer.path": byte_tokenizer(tmp_path),
        "evaluate.tasks": '["sciq"]',
        "evaluate.task_data": write_sciq(tmp_path / "tasks").parent,
        "evaluate.task_interval": 7,
    }
    with ranks(2, config, run, *words(settings), logs=tmp_path / "l", program=program) as members:
        wait_for(lambda: (run / "checkpoints" / "step_0000007").exists(), *members)
        assert wait_for_end(members, 60) < 30
        assert [m.process.returncode for m in members] == [status] * 2, members[0].output()
    assert fleet.newest(run) == 7


def test_a_stopped_rank_ends_the_run(config: Path, tmp_path: Path) -> None:
    """After parallel.step_timeout all show where they stand."""
    run, few = tmp_path / "run", {"parallel.step_timeout": 7}
    with ranks(2, config, run, *words(few), logs=tmp_path / "logs") as members:
        wait_for_step(run, 6, *members)
        members[1].process.send_signal(signal.SIGSTOP)
        wait_for_end(members, 30)
        assert members[0].process.returncode == 1
        assert f"rank 1 on {HOST} gave no sign of life" in members[0].last_line()
        assert members[1].process.returncode == -signal.SIGKILL, "nothing is left running"
        shown = (run / "stacks" / "rank_00000.txt").read_text()
        assert "train_step" in shown
        assert "train_step" in members[0].output()


@pytest.mark.cluster
def test_sigterm_does_not_wait_for_a_stopped_rank(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ranks(2, config, run, logs=tmp_path / "logs") as members:
        wait_for_step(run, 6, *members)
        members[0].process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # a step at least, so that the other one waits
        members[1].process.send_signal(signal.SIGTERM)
        assert wait_for_end(members[1:], 15) < 10
        assert f"rank 0 on {HOST} did not answer" in members[1].last_line()


@pytest.mark.cluster
def test_a_signal_to_one_rank_is_a_signal_to_all(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number, status in ((signal.SIGHUP, 0), (signal.SIGINT, 130)):
        before = fleet.steps(run)
        resume = ["--resume", "auto"] if before else []
        with ranks(2, config, run, *resume, logs=tmp_path / str(number)) as members:
            wait_for_step(run, before + 3, *members)
            members[1].process.send_signal(number)
            wait_for_end(members, 30)
            assert [m.process.returncode for m in members] == [status] * 2, members[0].output()
        assert fleet.newest(run) == fleet.steps(run)


@pytest.mark.cluster
@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_while_the_run_starts(number: int, config: Path, tmp_path: Path) -> None:
    """Whatever is being imported: in order, so that a batch system queues the job again."""
    for delay in (0.15, 1.2):
        run, log = tmp_path / f"{delay}", tmp_path / f"{delay}.log"
        with started(
            log, sys.executable, fleet.VERB, "--config", config, "--run-dir", run
        ) as member:
            time.sleep(delay)
            member.process.send_signal(number)
            wait_for_end([member], 10)
            assert member.process.returncode == (130 if number == signal.SIGINT else 0)
            assert signal.Signals(number).name in member.output()


@pytest.mark.cluster
def test_a_second_signal_leaves_at_once(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    slow = words({"data.sequence_length": 256, "train.global_batch_size": 256})
    with started(
        log, sys.executable, fleet.VERB, "--config", config, "--run-dir", run, *slow
    ) as one:
        wait_for_step(run, 1, one)
        one.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # two signals at once are one
        one.process.send_signal(signal.SIGTERM)
        assert wait_for_end([one], 10) < 5
        assert one.process.returncode == 128 + signal.SIGTERM
        assert "left without saving" in one.last_line()


@pytest.mark.cluster
def test_torchrun_restarts_from_the_newest_checkpoint(config: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--", fleet.VERB, "--config", config, "--run-dir", run]
    command += ["--resume", "auto", *words({"train.stop_after": 60})]
    with started(log, sys.executable, *command) as launcher:
        for goal in (6, 25):
            wait_for_step(run, goal, launcher)
            victim = fleet.descendants(launcher.process.pid)[-1]
            fleet.end(victim)
            wait_for(lambda victim=victim: not Path(f"/proc/{victim}").exists(), launcher)
        wait_for_end([launcher], 120)
        assert launcher.process.returncode == 0, launcher.output()
    assert launcher.output().count("resumed from") == 2
    assert sorted(fleet.losses(run)) == list(range(1, 61))


@pytest.mark.cluster
def test_ranks_notice_the_end_of_their_launcher(config: Path, tmp_path: Path) -> None:
    """SIGTERM to `deepspeed` ends it alone; its ranks save and leave."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2"]
    command += ["--master_port", free_port(), fleet.VERB, "--config", config, "--run-dir", run]
    with started(log, *command) as launcher:
        wait_for_step(run, 3, launcher)
        below = fleet.descendants(launcher.process.pid)
        launcher.process.terminate()
        wait_for_end([launcher], 30)
        until = time.monotonic() + 30
        try:
            while any(Path(f"/proc/{pid}").exists() for pid in below):
                assert time.monotonic() < until, launcher.output()
                time.sleep(0.1)  # polling processes that nobody here started
        finally:
            for pid in below:
                fleet.end(pid)
    assert fleet.newest(run) == fleet.steps(run)
    assert "stopped by a signal after step" in launcher.output()


@pytest.mark.cluster
def test_data_that_is_cut_short_while_a_run_reads_it(tmp_path: Path) -> None:
    """A sentence that names the file, of every rank, and no word of Python's."""
    config, run = fleet.write_config(tmp_path), tmp_path / "run"
    with ranks(2, config, run, logs=tmp_path / "logs") as members:
        wait_for_step(run, 6, *members)
        os.truncate(tmp_path / "tokens.bin", 2**10)
        wait_for_end(members, 60)
        output = "".join(member.output() for member in members)
        assert f"{tmp_path / 'tokens.bin'}: was" in output
        assert "Traceback" not in output
        for member in members:
            assert member.process.returncode in (1, 2)
            assert f"step_{fleet.newest(run):07d}" in member.last_line(), member.output()


def test_a_run_whose_folder_is_taken_from_it(config: Path, tmp_path: Path) -> None:
    """Moved away, it goes on in one made anew; another run's in its place is left alone."""
    run, log = tmp_path / "run", tmp_path / "log"
    with started(log, sys.executable, fleet.VERB, "--config", config, "--run-dir", run) as member:
        wait_for_step(run, 3, member)
        run.rename(tmp_path / "moved")
        wait_for(lambda: (run / "checkpoints" / "latest").exists() and fleet.steps(run), member)
        other = tmp_path / "other"
        other.mkdir()
        with Lock(other / "lock"):
            swap(other, run)
            member.process.send_signal(signal.SIGTERM)
            wait_for_end([member], 60)
            assert member.process.returncode == 2
            assert f"process {os.getpid()} on {HOST}" in member.last_line()
            assert [path.name for path in run.iterdir()] == ["lock"]


def swap(one: Path, other: Path) -> None:
    """Exchange two folders' names in one step, as two renames would not."""
    exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    assert library.renameat2(here, paths[0], here, paths[1], exchange) == 0, ctypes.get_errno()
