"""A run that a batch system stops, damages or starts again, as its user sees it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.random_tokens import write_random_tokens
from data import batches, open_dataset
from tests.launch.models import byte_tokenizer, huggingface_model, write_sciq
from tests.launch.running import ENVIRONMENT, ROOT, python, torchrun

VERB = "launch/pretrain.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    prefix = write_random_tokens(folder / "tokens", 2**16, vocab_size=256)
    path = folder / "tiny.json"
    path.write_text(
        json.dumps(
            {
                "model": {
                    "num_layers": 2,
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "vocab_size": 256,
                },
                "l2e": {"late_start_step": 4, "forget_step": 4},
                "data": {"path": str(prefix), "sequence_length": 32},
                "optimizer": {"learning_rate": 1e-2},
                "schedule": {"warmup_steps": 2},
                "train": {
                    "steps": 2000,
                    "global_batch_size": 4,
                    "micro_batch_size": 4,
                    "dtype": "fp32",
                },
                "evaluate": {"interval": 0, "batches": 1},
                "logging": {"interval": 1},
                "checkpoint": {"interval": 5, "keep_last": 4},
            }
        )
    )
    return path


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["lm_loss"] for row in rows}


def start(config: Path, run: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, VERB, "--config", str(config), "--run-dir", str(run), *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the run has written `step`; fails if it ends before."""
    path = run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)  # polling a file that another process writes
    pytest.fail(f"the run ended: {process.communicate()[0]}")


def test_stopped_by_signals_damaged_and_resumed(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number, first in ((signal.SIGTERM, 7), (signal.SIGUSR1, 60)):
        words = ["--resume", "auto"] if (run / "metrics.jsonl").exists() else []
        process = start(config, run, *words)
        try:
            wait_for_step(process, run, first)
            process.send_signal(number)
            begin = time.monotonic()
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 0, said
        assert time.monotonic() - begin < 30
        assert "--resume auto" in said
        stopped = max(losses(run))
        newest = (run / "checkpoints" / "latest").read_text().strip()
        assert newest == f"step_{stopped:07d}"  # nothing that was trained is lost

    # A byte of the newest checkpoint goes wrong: the run goes on from the one before.
    damaged = next((run / "checkpoints" / newest).glob("exp_avg-*"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    end = stopped + 3
    last = python(
        VERB, "--config", config, "--run-dir", run, "--resume", "auto",
        "--set", f"train.stop_after={end}",
    )  # fmt: skip
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"{newest} is damaged and passed over" in last.stdout
    assert damaged.name in last.stdout

    # All of it together is the run that nobody touched, bit for bit.
    whole = tmp_path / "whole"
    done = python(VERB, "--config", config, "--run-dir", whole, "--set", f"train.stop_after={end}")
    assert done.returncode == 0, done.stdout + done.stderr
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
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    trained = torchrun(2, VERB, "--config", config, "--run-dir", run, *words)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["scores"]["sciq"] for row in rows if row.get("scores")}
    assert sorted(scores) == [3, 6]
    output = tmp_path / "scores.json"
    asked = python(
        "launch/evaluate.py", "--checkpoint", run, "--tasks", "sciq", "--task-data", data,
        "--output", output,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert json.loads(output.read_text())["results"]["sciq"] == pytest.approx(scores[6])
    shown = json.loads((run / "results" / "evaluate_0shot_step_0000006.json").read_text())
    assert shown["items"]["sciq"]["count"] == 12
    settings["evaluate.tasks"] = '["sciqq"]'
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    refused = python(VERB, "--config", config, "--run-dir", tmp_path / "other", *words)
    assert refused.returncode == 2
    assert "did you mean sciq" in refused.stderr


def test_training_goes_on_from_a_hugging_face_model(config: Path, tmp_path: Path) -> None:
    """The first loss is the imported model's own, on the run's first batch."""
    model = huggingface_model(tmp_path / "hf")
    imported = Path(tmp_path / "imported")
    made = python("launch/export.py", "from-hf", "--model", tmp_path / "hf", "--output", imported)
    assert made.returncode == 0, made.stderr
    shape = json.loads((imported / "config.json").read_text())["model"]
    shape = {key: value for key, value in shape.items() if value is not None}
    settings = [f"model.{key}={json.dumps(value)}" for key, value in shape.items()]
    settings += ["train.stop_after=1", "train.micro_batch_size=4"]
    words = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    # A relative name of one part, as in the README
    trained = subprocess.run(
        [
            sys.executable,
            ROOT / VERB,
            "--config",
            config,
            "--run-dir",
            run,
            "--resume",
            "imported",
            *words,
        ],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    batch = first_batch(config)
    with torch.no_grad():
        expected = model(batch, labels=batch).loss.item()
    assert losses(run)[1] == pytest.approx(expected, rel=1e-4)


def first_batch(config: Path) -> torch.Tensor:
    """Tokens [4, 33] of the run's first step."""
    settings = json.loads(config.read_text())
    path = settings["data"]["path"]
    dataset = open_dataset(path, 32, 1234, 2000 * 4, split=0.01)
    return next(batches(dataset, 0, 4, 4))
