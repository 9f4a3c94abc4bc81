"""A run that a batch system stops, damages or starts again, as its user sees it."""

import contextlib
import io
import itertools
import json
import shutil
import signal
import statistics
import sys
from pathlib import Path

import pytest
import torch

from data import batches, open_dataset
from data.lock import Lock
from launch import pretrain
from launch.checkpoint.stored import open_checkpoint
from launch.evaluation.run import find_models
from tests.launch import fleet
from tests.launch.fleet import losses, metrics
from tests.launch.models import byte_tokenizer, huggingface_model, write_sciq
from tests.launch.running import ROOT, refused, succeeds, torchrun

VERB = "launch/pretrain.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return fleet.write_config(
        tmp_path_factory.mktemp("resume"),
        train={"steps": 2000, "micro_batch_size": 4},
        logging={"tensorboard": True},
        checkpoint={"keep_last": 4},
    )


def test_stopped_by_signals_damaged_and_resumed(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number, first in ((signal.SIGTERM, 7), (signal.SIGUSR2, 60)):
        words = ["--resume", "auto"] if (run / "metrics.jsonl").exists() else []
        command = (sys.executable, VERB, "--config", config, "--run-dir", run, *words)
        with fleet.started(tmp_path / f"{number}.log", *command) as member:
            fleet.wait_for_step(run, first, member)
            member.process.send_signal(number)
            fleet.wait_for_end([member], 30)
        assert member.process.returncode == 0, member.output()
        assert "--resume auto" in member.output()
        stopped = max(losses(run))
        newest = (run / "checkpoints" / "latest").read_text().strip()
        assert newest == f"step_{stopped:07d}"  # nothing that was trained is lost

    # A byte of the newest checkpoint goes wrong: the run goes on from the one before.
    damaged = next((run / "checkpoints" / newest).glob("exp_avg-*"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    end = stopped + 3
    last = succeeds(
        VERB, "--config", config, "--run-dir", run, "--resume", "auto",
        "--set", f"train.stop_after={end}",
    )  # fmt: skip
    assert f"{newest} is damaged and passed over" in last.stdout
    assert damaged.name in last.stdout

    # All of it together is the run that nobody touched, bit for bit.
    whole = tmp_path / "whole"
    succeeds(VERB, "--config", config, "--run-dir", whole, "--set", f"train.stop_after={end}")
    assert losses(run) == losses(whole)
    assert max(losses(run)) == end


def test_scores_in_training_are_those_of_the_checkpoint(config: Path, tmp_path: Path) -> None:
    """Two data-parallel ranks share the items; evaluate.py on what they saved says the same."""
    run, data = tmp_path / "run", write_sciq(tmp_path / "tasks").parent
    settings = {
        "model.vocab_size": 300,
        "model.max_position_embeddings": 256,
        "tokenizer.path": byte_tokenizer(tmp_path),
        "train.micro_batch_size": 2,
        "train.stop_after": 6,
        "evaluate.tasks": '["sciq"]',
        "evaluate.task_data": data,
        "evaluate.task_interval": 3,
    }
    torchrun(2, VERB, "--config", config, "--run-dir", run, *fleet.words(settings))
    rows = metrics(run)
    scores = {row["step"]: row["scores"]["sciq"] for row in rows if row.get("scores")}
    assert sorted(scores) == [3, 6]
    output = tmp_path / "scores.json"
    succeeds(
        "launch/evaluate.py", "--checkpoint", run, "--tasks", "sciq", "--task-data", data,
        "--output", output,
    )  # fmt: skip
    assert json.loads(output.read_text())["results"]["sciq"] == pytest.approx(scores[6])
    shown = json.loads((run / "results" / "evaluate_0shot_step_0000006.json").read_text())
    assert shown["items"]["sciq"]["count"] == 12
    settings["evaluate.tasks"] = '["sciqq"]'
    words = ("--config", config, "--run-dir", tmp_path / "other", *fleet.words(settings))
    told = refused(VERB, *words)
    assert "did you mean sciq" in told


def test_training_goes_on_from_a_hugging_face_model(config: Path, tmp_path: Path) -> None:
    """The first loss is the imported model's own, on the run's first batch."""
    model = huggingface_model(tmp_path / "hf")
    imported = Path(tmp_path / "imported")
    succeeds("launch/export.py", "from-hf", "--model", tmp_path / "hf", "--output", imported)
    shape = json.loads((imported / "config.json").read_text())["model"]
    shape = {key: value for key, value in shape.items() if value is not None}
    settings = [f"model.{key}={json.dumps(value)}" for key, value in shape.items()]
    settings += ["train.stop_after=1", "train.micro_batch_size=4"]
    words = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    # A relative name of one part, as in the README
    words += ["--run-dir", run, "--resume", "imported"]
    succeeds(ROOT / VERB, "--config", config, *words, cwd=tmp_path)
    batch = first_batch(config)
    with torch.no_grad():
        expected = model(batch, labels=batch).loss.item()
    assert losses(run)[1] == pytest.approx(expected, rel=1e-4)


def test_branches_another_batch_size_and_broken_companions(config: Path, tmp_path: Path) -> None:
    """At rate 0 a step's loss is the mean of its samples' own, which a run of one each tells."""
    run, common = tmp_path / "run", ["optimizer.learning_rate=0", "l2e.method=none"]

    def train(folder: Path, *settings: str, resume: str | Path = "none") -> str:
        words = [word for setting in (*common, *settings) for word in ("--set", setting)]
        done = succeeds(VERB, "--config", config, "--run-dir", folder, "--resume", resume, *words)
        return done.stdout

    train(run, "train.stop_after=6", "checkpoint.interval=2")
    checkpoints = run / "checkpoints"
    copied = shutil.copytree(checkpoints / "step_0000004", tmp_path / "copied")

    def outcome(*words: str | Path) -> str:
        """Refused or with nothing to do, in this process; the folder stays as it was."""
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        command = ["--config", config, "--run-dir", run, *words]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                pretrain.main([str(word) for word in command])
            except ValueError as error:
                said.write(str(error))
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        return said.getvalue()

    auto = ("--resume", "auto", "--set")
    assert "train.seed from 1234 to 5" in outcome(*auto, "train.seed=5")
    for words in ((), ("--dry-run",)):
        assert "nothing left to do: step 6 of 6" in outcome(*words, *auto, "train.stop_after=6")
    assert "train.seed from 1234 to 5" in outcome("--dry-run", *auto, "train.seed=5")
    assert "hidden_size is 32 there and 64" in outcome("--dry-run", *auto, "model.hidden_size=64")
    planned = outcome("--dry-run", "--resume", checkpoints / "step_0000004", "--set", "l2e.topk=5")
    assert "step_0000004, at step 4 with 16 samples read" in planned
    assert "l2e.topk was 1, is 5" in planned
    assert "64,350 tokens the run reads 4.0 times" in planned  # of its 2,000 x 4 x 32
    for words in ((), ("--dry-run",)):
        assert "holds a run already" in outcome(*words)
        assert "none of its own checkpoints" in outcome(*words, "--resume", copied)
    with Lock(run / "lock"):
        assert "is training in this folder" in outcome(*auto, "train.steps=7")
    elsewhere = ("--run-dir", tmp_path / "new", "--resume", copied, "--set")
    for words in (elsewhere, ("--dry-run", *elsewhere)):
        assert "data.sequence_length from 32 to 31" in outcome(*words, "data.sequence_length=31")

    # As a crash may leave them.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lm_lo')
    (run / "manifest.json").write_text("")
    (checkpoints / "latest").write_bytes(bytes(20))
    said = train(
        run, "train.stop_after=8", "train.global_batch_size=6", "train.micro_batch_size=3",
        "optimizer.betas=[0.8, 0.9]", "checkpoint.interval=0",
        resume=checkpoints / "step_0000004",
    )  # fmt: skip
    assert "train.global_batch_size was 4, is 6" in said
    assert "optimizer.betas was [0.9, 0.95], is [0.8, 0.9]" in said
    assert "1 lines cut off" in said
    assert "manifest.json cannot be read and is passed over" in said
    aside = run / "set_aside" / "after_step_0000004.1"
    assert [path.name for path in aside.rglob("step_*")] == ["step_0000006"]
    lines = (aside / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:2]] == [5, 6]
    assert (run / "config.1.json").exists()
    assert open_checkpoint(run).folder == checkpoints / "step_0000008"
    (checkpoints / "latest").write_text("step_0000004")
    assert open_checkpoint(run).folder == checkpoints / "step_0000004"
    assert [step for step, _ in find_models(str(run), "latest")] == [4]
    assert [step for step, _ in find_models(str(run), "all")] == [2, 4]

    read = [4, 8, 12, 16, 22, 28, 34, 40]  # samples after each step
    assert [row["tokens"] for row in metrics(run)] == [32 * samples for samples in read]
    single = tmp_path / "single"
    sizes = ["train.global_batch_size=1", "train.micro_batch_size=1", "train.steps=8000"]
    train(single, *sizes, f"train.stop_after={read[-1]}", "checkpoint.interval=0")
    one = list(losses(single).values())
    means = [statistics.mean(one[a:b]) for a, b in itertools.pairwise([0, *read])]
    assert list(losses(run).values()) == pytest.approx(means, rel=1e-5)
    assert len(set(one)) > 30

    # A disk that stays full for the log alone.
    (single / "metrics.jsonl").unlink()
    (single / "metrics.jsonl").symlink_to("/dev/full")
    said = train(single, *sizes, f"train.stop_after={read[-1] + 2}", resume="auto")
    assert f"the lines of steps 1 to {read[-1]} are missing" in said
    assert "metrics.jsonl cannot be written: its last 2 entries are lost" in said


def first_batch(config: Path) -> torch.Tensor:
    """Tokens [4, 33] of the run's first step."""
    settings = json.loads(config.read_text())
    path = settings["data"]["path"]
    dataset = open_dataset(path, 32, 1234, 2000 * 4, split=0.01)
    return next(batches(dataset, 0, 4, 4))
