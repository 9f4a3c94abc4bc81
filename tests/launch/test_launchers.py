"""Launchers of several hosts, for real, with hosts that are all this machine."""

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launch import fleet
from tests.launch.fleet import Member, started, wait_for_end, words
from tests.launch.running import free_port

pytestmark = pytest.mark.cluster
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
# What stands for ssh: the command runs here. `ssh [options] host command...`
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
    case "$1" in -l|-o|-p|-i|-F) shift ;; esac
    shift
done
shift
exec /bin/sh -c "$*"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The folders of programs, with our ssh before them."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return fleet.write_config(tmp_path_factory.mktemp("launchers"), train={"steps": 12})


def hostfile(folder: Path, *hosts: str, slots: int = 1) -> Path:
    path = folder / "hostfile"
    path.write_text("".join(f"{host} slots={slots}\n" for host in hosts))
    return path


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: apt-get install pdsh openmpi-bin")


def check(members: list[Member], run: Path, launcher: str) -> None:
    """Every launcher ended in order, and two ranks trained one run between them."""
    wait_for_end(members, 240)
    told = "".join(member.output() for member in members)
    assert [member.process.returncode for member in members] == [0] * len(members), told
    assert f"2 data parallel ({launcher})" in told, told
    assert sorted(fleet.losses(run)) == list(range(1, 13))


def test_deepspeed_without_ssh(config: Path, tmp_path: Path) -> None:
    """The command is given on each host, with the number of its node."""
    run, hosts = tmp_path / "run", hostfile(tmp_path, "first", "second")
    port = free_port()
    with ExitStack() as stack:
        members = []
        for node in range(2):
            command = [DEEPSPEED, "--hostfile", hosts, "--no_ssh", "--node_rank", node]
            command += ["--master_addr", "localhost", "--master_port", port]
            command += [fleet.VERB, "--config", config, "--run-dir", run]
            members.append(stack.enter_context(started(tmp_path / f"{node}.log", *command)))
        check(members, run, "deepspeed")


def test_deepspeed_by_pdsh(config: Path, tmp_path: Path, path: str) -> None:
    """pdsh reaches the hosts through ssh, in whose place a script stands."""
    needs("pdsh")
    run, hosts = tmp_path / "run", hostfile(tmp_path, "localhost", "127.0.0.1")
    command = [DEEPSPEED, "--hostfile", hosts, "--launcher", "pdsh", "--master_addr", "localhost"]
    command += ["--master_port", free_port(), fleet.VERB, "--config", config, "--run-dir", run]
    with started(tmp_path / "log", *command, PATH=path) as member:
        check([member], run, "deepspeed")


def test_deepspeed_by_openmpi(config: Path, tmp_path: Path, path: str) -> None:
    needs("mpirun")
    run, hosts = tmp_path / "run", hostfile(tmp_path, "localhost", slots=2)
    command = [DEEPSPEED, "--hostfile", hosts, "--force_multi", "--launcher", "openmpi"]
    command += ["--launcher_args", "--oversubscribe --mca btl_tcp_if_include lo"]
    command += ["--master_addr", "localhost", "--master_port", free_port()]
    command += [fleet.VERB, "--config", config, "--run-dir", run]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with started(tmp_path / "log", *command, PATH=path, **root) as member:
        check([member], run, "mpirun")


def test_mpirun(config: Path, tmp_path: Path) -> None:
    needs("mpirun")
    run = tmp_path / "run"
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", 2, sys.executable]
    command += [fleet.VERB, "--config", config, "--run-dir", run, *words({"train.seed": 3})]
    with started(tmp_path / "log", *command) as member:
        check([member], run, "mpirun")
