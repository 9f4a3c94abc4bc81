"""`launch/pretrain.py` as a user types it: mistakes, launchers, a run that learns, its folder."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import fleet
from tests.launch.fleet import metrics
from tests.launch.running import (
    ENVIRONMENT,
    ROOT,
    deepspeed,
    free_port,
    python,
    refused,
    succeeds,
    torchrun,
)

VERB = "launch/pretrain.py"
STEPS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on Python's standard library, prepared once for all tests of this file."""
    folder = tmp_path_factory.mktemp("tiny")
    prefix = folder / "corpus" / "builtin"
    succeeds(
        "launch/prepare.py", "--corpus", "builtin", "--train-tokenizer", "sentencepiece",
        "--vocab-size", "512", "--sample-mb", "1", "--output", prefix, "--workers", "2",
    )  # fmt: skip
    return fleet.write_config(
        folder,
        model={"hidden_size": 64, "vocab_size": 512},
        data={"path": str(prefix), "validation_path": f"{prefix}_validation"}
        | {"sequence_length": 64},
        tokenizer={"path": f"{prefix}.tokenizer.model"},
        train={"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 4},
        evaluate={"interval": 8, "batches": 2},
        logging={"interval": 4, "tensorboard": True},
        checkpoint={"interval": 0},
    )


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny run, trained by plain `python`."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    succeeds(VERB, "--config", config, "--run-dir", folder)
    return folder


def test_a_run_learns_and_leaves_its_folder(alone: Path) -> None:
    lines = metrics(alone)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    # Nothing is known yet: 512 tokens alike, but for the logits' variance 64 * 2/(5*64) = 0.4,
    # which costs half of it.
    assert lines[0]["lm_loss"] == pytest.approx(math.log(512) + 0.2, rel=0.01)
    validation = {
        line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line
    }
    assert list(validation) == [1, 8, 16, 24]
    assert validation[24] < validation[1] - 1
    names = {p.name for p in alone.iterdir()}
    assert {"config.json", "manifest.json", "metrics.jsonl", "tensorboard", "finished"} <= names


def test_metrics_have_the_contracts_keys(alone: Path) -> None:
    keys = {
        "step", "tokens", "loss", "lm_loss", "ms_loss", "grad_norm", "lr", "loss_scale",
        "tokens_per_second", "mfu", "step_seconds", "l2e",
    }  # fmt: skip
    lines = metrics(alone)
    assert all(keys <= line.keys() for line in lines)
    assert lines[-1]["tokens"] == STEPS * 16 * 64
    layer_keys = {
        "tau",
        "selected_fraction",
        "mean_ms",
        "max_ms",
        "std",
        "kurtosis",
        "mlp_to_residual",
        "weight",
        "gradient_ratio",
    }
    for line in lines[3::4]:
        assert set(line["l2e"]) == {"0", "1"}
        assert all(layer_keys == set(numbers) for numbers in line["l2e"].values())
    assert lines[2]["ms_loss"] == 0
    assert lines[-1]["ms_loss"] != 0  # inhibition has begun


def test_the_manifest_says_what_ran(alone: Path) -> None:
    manifest = json.loads((alone / "manifest.json").read_text())
    assert manifest["versions"]["deepspeed"]
    assert len(manifest["data"]["order_hash"]) == 64
    expected = math.sqrt(2 / (5 * 64))  # Pythia's formula
    measured = manifest["initial_std"]["gpt_neox.embed_in.weight"]
    assert measured == pytest.approx(expected, rel=0.02)


def test_tensorboard_has_the_same_numbers(alone: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(alone / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = [event.value for event in events.Scalars("train/lm_loss")]
    assert losses == pytest.approx([line["lm_loss"] for line in metrics(alone)])
    assert events.Scalars("l2e_tau/layer_0")
    assert events.Histograms("ms_log2/layer_0")


def test_what_is_kept_and_watched_on_the_way(config: Path, tmp_path: Path) -> None:
    """Steps kept for good, step 0 among them, written in the background; features measured."""
    features = tmp_path / "features.jsonl"
    texts = {"code": "def f(x): return x", "prose": "Once upon a time there was a sea"}
    rows = [
        {"text": f"{text} {number}", "feature": feature}
        for feature, text in texts.items()
        for number in range(4)
    ]
    features.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    settings = (
        "train.stop_after=5", "checkpoint.interval=1", "checkpoint.keep_last=1",
        "checkpoint.steps=[0,2]", "checkpoint.background=true", "logging.interval=1",
        f"monitor.features={features}", "monitor.interval=2",
    )  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    done = succeeds(VERB, "--config", config, "--run-dir", folder, *words)
    assert "scale and fkr of 8 passages of 2 features (features), every 2 steps" in done.stdout
    assert done.stdout.count("training was held up for") == 6
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == ["step_0000000", "step_0000002", "step_0000005"]
    measured = {line["step"]: line["monitor"] for line in metrics(folder) if "monitor" in line}
    assert list(measured) == [2, 4, 5]
    assert all(set(measured[5][block]) == {"mean_ms", "ks", "fkr"} for block in ("0", "1"))

    succeeds(
        VERB, "--config", config, "--run-dir", tmp_path / "from_0", "--set", "train.stop_after=5",
        "--set", "logging.interval=1", "--resume", folder / "checkpoints" / "step_0000000",
    )  # fmt: skip
    losses = [[line["lm_loss"] for line in metrics(run)] for run in (folder, tmp_path / "from_0")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_two_processes_train_the_same_run(
    launcher: str, config: Path, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / launcher
    words = (VERB, "--config", config, "--run-dir", folder)
    if launcher == "torchrun":
        torchrun(2, *words)
    elif launcher == "deepspeed":
        deepspeed(2, *words)
    else:
        start_as_srun(*words)
    for one, two in zip(metrics(alone), metrics(folder), strict=True):
        assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=2e-4)
        assert two["ms_loss"] == pytest.approx(one["ms_loss"], rel=2e-3, abs=1e-6)


def start_as_srun(*words: str | Path) -> None:
    """Two processes with the variables that srun sets, and nothing else."""
    shared = {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=ENVIRONMENT | shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]


def test_every_mistake_is_told_before_anything_starts(config: Path, tmp_path: Path) -> None:
    told = refused(
        VERB, "--config", config, "--run-dir", tmp_path / "run",
        "--set", "train.stepz=3", "--set", "model.num_attention_heads=5",
        "--set", "data.path=nowhere", "--set", "train.global_batch_size=7",
    )  # fmt: skip
    for part in ("4 errors", "did you mean train.steps?", "model.num_attention_heads", "nowhere",
                 "train.global_batch_size = 7"):  # fmt: skip
        assert part in told, told
    assert not (tmp_path / "run").exists()


def test_mistakes_of_several_ranks_are_told_once(config: Path) -> None:
    words = ("--config", config, "--set", "train.global_batch_size=7")
    done = torchrun(2, VERB, *words, run=python)
    assert done.returncode != 0
    assert done.stderr.count("train.global_batch_size = 7") == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("parallel.pipeline=2", "deepspeed.zero_optimization.stage=2"), "ZeRO-1 alone"),
        (("train.dtype=fp16", "deepspeed.zero_optimization.stage=0"), "fp16 at ZeRO-0"),
        (("parallel.tensor=3",), "divide"),
        (("tokenizer.path=missing.json",), "missing.json"),
    ],
)
def test_dry_run_refuses(config: Path, settings: tuple[str, ...], told: str) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    assert told in refused(VERB, "--config", config, "--dry-run", *words)


def test_what_this_machine_cannot_run_is_refused(config: Path, tmp_path: Path) -> None:
    words = ("--config", config, "--run-dir", tmp_path / "run")
    settings = ("--set", "parallel.sequence=true", "--set", "parallel.tensor=2")
    done = torchrun(2, VERB, *words, *settings, run=python)
    assert done.returncode != 0
    assert (
        "parallel.sequence = True: megatron-core's sequence parallelism needs CUDA" in done.stderr
    )


def test_a_truncated_index_is_refused(config: Path, tmp_path: Path) -> None:
    prefix = json.loads(config.read_text())["data"]["path"]
    for ending in ("bin", "idx"):
        content = Path(f"{prefix}.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(content[: -100 if ending == "idx" else None])
    words = ("--config", config, "--dry-run", "--set", f"data.path={tmp_path / 'cut'}")
    assert "cut.idx" in refused(VERB, *words)


def test_a_second_run_in_the_same_folder_is_refused(config: Path, alone: Path) -> None:
    assert "--resume auto" in refused(VERB, "--config", config, "--run-dir", alone)


def test_help_and_help_config() -> None:
    assert "examples:" in python(VERB, "--help").stdout
    assert "train.global_batch_size" in python(VERB, "--help-config").stdout
