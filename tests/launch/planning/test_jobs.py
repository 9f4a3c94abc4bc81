"""Job files: run by a shell with a stand-in for Slurm, and held against Kubernetes' own models."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.planning import jobs
from tests.launch.running import ROOT

SHIPPED = {
    "pretrain.slurm": ["--scheduler", "slurm"],
    "pretrain.yaml": ["--scheduler", "kubernetes", "--nodes", "2"],
    "hostfile": ["--scheduler", "hostfile", "--nodes", "2"],
}


def written(tmp_path: Path, *arguments: str) -> Path:
    path = tmp_path / "job"
    jobs.main(["--config", "configs/410m.json", *arguments, "--output", str(path)])
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_are_what_the_command_writes(name: str, tmp_path: Path) -> None:
    job = written(tmp_path, *SHIPPED[name])
    assert job.read_text() == (ROOT / "launch" / "cluster" / name).read_text()


def run_script(script: Path, folder: Path, status: int, **variables: str):
    """The script under a Slurm that notes what it is asked for; srun leaves with `status`."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool, code in (("srun", status), ("scontrol", 0)):
        path = tools / tool
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" {tool} "$@"\nexit {code}\n')
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_SUBMIT_DIR": str(folder)} | variables
    return subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, check=False
    )


def test_each_task_of_an_array_has_its_own_folder_and_settings(tmp_path: Path) -> None:
    array = ["--array", "train.seed=1,2", "optimizer.learning_rate=1e-3,3e-4"]
    script = written(tmp_path, "--scheduler", "slurm", *array, "--run-dir", "runs/my sweep")
    assert "#SBATCH --array=0-3" in script.read_text()
    folders = set()
    for task in range(4):
        done = run_script(script, tmp_path, 0, SLURM_ARRAY_TASK_ID=str(task))
        words = done.stdout.splitlines()
        assert done.returncode == 0, done.stderr
        folders.add(words[words.index("--run-dir") + 1])
        assert words.count("--set") == 2
        assert f"train.seed={1 + task // 2}" in words
    assert len(folders) == 4
    assert all(folder.startswith("runs/my sweep/train.seed=") for folder in folders)
    # As shipped there is one task; an array of it is refused, not written into one folder.
    shipped = run_script(
        ROOT / "launch/cluster/pretrain.slurm", tmp_path, 0, SLURM_ARRAY_TASK_ID="1"
    )
    assert shipped.returncode == 2
    assert "srun" not in shipped.stdout


@pytest.mark.parametrize(
    ("status", "restarts", "finished", "requeued"),
    [(0, 0, False, True), (0, 0, True, False), (1, 3, False, True), (1, 20, False, False),
     (2, 0, False, False)],
)  # fmt: skip
def test_when_a_job_goes_back_into_the_queue(
    status: int, restarts: int, finished: bool, requeued: bool, tmp_path: Path
) -> None:
    """After an early stop and after failures, but not for ever, nor for a user's mistake."""
    script = written(tmp_path, "--scheduler", "slurm", "--run-dir", str(tmp_path / "run"))
    if finished:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "finished").touch()
    done = run_script(script, tmp_path, status, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == status
    assert ("scontrol\nrequeue\n7\n" in done.stdout) == requeued
    assert "--resume\nauto\n" in done.stdout
    assert "#SBATCH --signal=USR1@" in script.read_text()


def test_the_kubernetes_job_meets_at_its_first_pod(tmp_path: Path) -> None:
    job = written(
        tmp_path, "--scheduler", "kubernetes", "--nodes", "4", "--array", "train.seed=1,2"
    )
    documents = list(yaml.safe_load_all(job.read_text()))
    assert [one["kind"] for one in documents] == ["Service", "Job"] * 2
    names = [one["metadata"]["name"] for one in documents]
    assert names == ["l2e-410m-0", "l2e-410m-0", "l2e-410m-1", "l2e-410m-1"]
    spec = documents[1]["spec"]
    assert (spec["completions"], spec["completionMode"]) == (4, "Indexed")
    pod = spec["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert "--master-addr=l2e-410m-0-0.l2e-410m-0" in command
    assert pod["subdomain"] == documents[0]["metadata"]["name"]
    assert command[command.index("--run-dir") + 1] == "/runs/410m/train.seed=1"
    assert pod["restartPolicy"] == "OnFailure"


def test_kubernetes_own_client_takes_every_key(tmp_path: Path) -> None:
    client = pytest.importorskip("kubernetes.client", reason="pip install kubernetes")
    job = written(tmp_path, "--scheduler", "kubernetes", "--nodes", "2")
    kinds = {"Service": "V1Service", "Job": "V1Job"}
    for document in yaml.safe_load_all(job.read_text()):
        refuse_unknown(document, kinds[document["kind"]], client)


def refuse_unknown(value, kind: str, client) -> None:
    """Walk a document along the types of the official models."""
    if kind.startswith("list["):
        for one in value:
            refuse_unknown(one, kind[5:-1], client)
    elif model := getattr(client, kind, None):
        keys = {name: attribute for attribute, name in model.attribute_map.items()}
        for key, inner in value.items():
            assert key in keys, f"{kind} has no {key}"
            refuse_unknown(inner, model.openapi_types[keys[key]], client)
    elif kind in ("int", "str", "bool"):
        assert type(value).__name__ == kind, f"{value} is no {kind}"


ODD = 'it\'s my "best" config $HOME, (n°1)'


def odd(tmp_path: Path, *arguments: str) -> Path:
    """A job of a configuration, in a folder, with a name that shells and YAML take apart."""
    folder = tmp_path / ODD
    folder.mkdir()
    config = shutil.copy(ROOT / "configs" / "demo.json", folder / f"{ODD}.json")
    jobs.main(["--config", str(config), "--gpus-per-node", "2", *arguments,
               "--output", str(tmp_path / "job")])  # fmt: skip
    return tmp_path / "job"


def test_odd_names_reach_the_trainer_as_they_are(tmp_path: Path) -> None:
    array = ["--array", "l2e.layers=[0, 1],mid2", 'data.path={"a,b": 1},builtin']
    config = f"{tmp_path}/{ODD}/{ODD}.json"
    with pytest.raises(ValueError, match=r"a,b\.bin"):  # each value is whole
        odd(tmp_path, "--scheduler", "slurm", *array)
    shutil.rmtree(tmp_path / ODD)
    script = odd(tmp_path, "--scheduler", "slurm", *array[:2], "--run-dir", f"runs/{ODD}")
    subprocess.run(["bash", "-n", script], check=True)
    header = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    assert all(len(shlex.split(line)) == 1 for line in header), header
    words = run_script(script, tmp_path, 0, SLURM_ARRAY_TASK_ID="0").stdout.splitlines()
    assert words[words.index("--config") + 1] == config
    assert words[words.index("--run-dir") + 1].startswith(f"runs/{ODD}/l2e.layers=")
    assert words[words.index("--set") + 1] == "l2e.layers=[0, 1]"


def test_odd_names_in_a_kubernetes_job(tmp_path: Path) -> None:
    job = odd(tmp_path, "--scheduler", "kubernetes", "--set", "logging.interval=7",
              "--run-dir", "/runs/a/../$(x) b")  # fmt: skip
    service, spec = yaml.safe_load_all(job.read_text())
    for one in (service, spec):
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,55}[a-z0-9])?", one["metadata"]["name"])
    command = spec["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--config") + 1] == f"{tmp_path}/{ODD}/{ODD}.json"
    assert command[command.index("--run-dir") + 1] == "/runs/$$(x) b"  # $(x) to the trainer


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("slurm --array train.seed=1,2 train.seed=3", "train.seed is there twice"),
        ("slurm --array train.seed=1, ", "KEY=VALUE,VALUE"),
        ("slurm --hosts a", "--hosts is for --scheduler hostfile"),
        ("hostfile --time 1:00", "--time is for --scheduler slurm"),
        ("hostfile --hosts a,a --nodes 2", "a host is there twice"),
        ("hostfile --hosts a,,b,c --nodes 4", "'' is no host's name"),
        ("hostfile --hosts n[1-2] --nodes 2", "is no host's name"),
        ("kubernetes --run-dir /data/run", "only /runs stays"),
        ("kubernetes --run-dir ../run", "only /runs stays"),
        ("slurm --time 1day", "hours:minutes:seconds"),
        ("kubernetes --image l2e:a;b", "no name of an image"),
        ("slurm --nodes 0", "1 to 100000 is meant"),
    ],
)
def test_what_a_job_would_pass_over_is_refused(tmp_path, capsys, arguments, told) -> None:
    with pytest.raises((ValueError, SystemExit)) as refused:
        written(tmp_path, "--scheduler", *arguments.split())
    assert told in str(refused.value) + capsys.readouterr().err


def test_what_cannot_be_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="KEY=VALUE,VALUE"):
        written(tmp_path, "--scheduler", "slurm", "--array", "train.seed")
    with pytest.raises(ValueError, match=r"train\.seedd"):
        written(tmp_path, "--scheduler", "slurm", "--array", "train.seedd=1,2")
    with pytest.raises(ValueError, match=r"3 hosts, but --nodes 2"):
        written(tmp_path, "--scheduler", "hostfile", "--nodes", "2", "--hosts", "a,b,c")
    with pytest.raises(ValueError, match="global_batch_size"):
        written(tmp_path, "--scheduler", "slurm", "--nodes", "7")


def test_the_pages_commands_write_their_files(tmp_path: Path) -> None:
    page = (ROOT / "docs/how_to/run_on_a_cluster.md").read_text()
    commands = re.findall(r"^python launch/plan\.py job (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for number, command in enumerate(commands):
        words = shlex.split(command)
        path = tmp_path / f"{number}"
        words[words.index("--output") + 1] = str(path)
        jobs.main(words)
        assert "Written by plan.py job" in path.read_text()
