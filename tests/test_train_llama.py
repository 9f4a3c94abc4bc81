"""The whole program of the how-to pages, a Llama in a plain loop: what it trains and measures."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import configs
from data import batches
from launch import experiment, prepare
from launch.training import data
from launch.training.position import Position
from tests.launch.fleet import metrics
from tests.launch.models import VOCABULARY, byte_tokenizer
from tests.launch.running import ROOT

PROGRAM = ROOT / "docs" / "how_to" / "train_llama.py"
STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A tiny run; its features are two kinds of passages."""
    folder = tmp_path_factory.mktemp("llama")
    texts = [f"{n} plus {n} is {2 * n}, said {'the sea ' * (n % 7)}" for n in range(300)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    words = ["--input", str(folder / "texts.jsonl"), "--output", str(folder / "tokens")]
    words += ["--tokenizer", str(byte_tokenizer(folder))]
    prepare.build(prepare.parser().parse_args(words))
    passages = [{"text": t, "feature": "abc"[n % 2] * 3} for n, t in enumerate(texts[:20])]
    (folder / "features.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    sections = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
        "l2e": {"late_start_step": 1, "layers": [1], "weight": 0.01},
        "monitor": {"features": str(folder / "features.jsonl"), "tokens": 16},
        "data": {"path": str(folder / "tokens"), "sequence_length": 16},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"warmup_steps": 0},
        "train": {"steps": STEPS, "dtype": "fp32", "global_batch_size": 8, "micro_batch_size": 4},
        "evaluate": {"interval": 2, "batches": 2, "layer_worth": True},
        "logging": {"interval": 3},
    }
    sections["model"]["vocab_size"] = VOCABULARY
    sections["data"]["validation_fraction"] = 0.2
    (folder / "tiny.json").write_text(json.dumps(sections))
    return folder / "tiny.json"


def train(config: Path, folder: Path, *settings: str) -> list[dict]:
    """The metrics of a run that goes on from where it is."""
    words = ["--config", str(config), "--run-dir", str(folder), "--resume", "auto"]
    words += [word for setting in settings for word in ("--set", setting)]
    experiment.train(words, PROGRAM)
    assert (folder / "finished").exists()
    return metrics(folder)


def test_the_schedule_is_followed(config, tmp_path, monkeypatch):
    """At a rate of 0 from step 3 on, weights stay what they are after it, and so does the loss."""
    program = experiment.load_program(PROGRAM)
    monkeypatch.setattr(program, "learning_rate", lambda _, step: 0.01 if step < 3 else 0.0)
    words = ["--config", str(config), "--run-dir", str(tmp_path), "--set", "l2e.method=none"]
    program.main([*words, "--set", "evaluate.interval=1"])
    losses = [row["validation_loss"] for row in metrics(tmp_path)]
    assert len(set(losses[:3])) == 3
    assert losses[2:] == [losses[2]] * (STEPS - 2)


def test_losses_are_those_of_transformers(config, tmp_path):
    """The first step's and the last validation's, computed anew with transformers' own loss."""
    rows = train(config, tmp_path, "l2e.method=none", "optimizer.learning_rate=0")
    settings = configs.load(config)
    model = experiment.load_program(PROGRAM).build(settings)
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)["model"])
    paths = data.fetch(settings, tmp_path)
    corpus = data.open_corpus(settings, tmp_path, paths, Position())

    def loss(samples, count):
        read = itertools.islice(batches(samples, 0, 8, 8), count)
        with torch.no_grad():
            return sum(float(model(input_ids=t, labels=t).loss) for t in read) / count

    assert rows[0]["lm_loss"] == pytest.approx(loss(corpus.training, 1), rel=1e-5)
    assert rows[-1]["validation_loss"] == pytest.approx(loss(corpus.validation, 2), rel=1e-5)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert "validation_loss" not in rows[2]


def test_interrupted_anywhere_it_ends_with_the_same_numbers(config, tmp_path, monkeypatch):
    whole = train(config, tmp_path / "whole")
    for stop in (1, 2, 4):  # killed right after writing the metrics of these steps
        program = experiment.load_program(PROGRAM)
        save = program.save

        def interrupted(folder, step, *state, save=save, stop=stop):
            if step > stop:
                raise KeyboardInterrupt
            save(folder, step, *state)

        program.save = interrupted
        monkeypatch.setattr(experiment, "load_program", lambda _, program=program: program)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts")
        monkeypatch.undo()
    parts = train(config, tmp_path / "parts")
    for row in (*whole, *parts):
        row.pop("step_seconds")
    assert parts == whole


def test_what_the_arms_do(config, tmp_path):
    arms = {
        "none": train(config, tmp_path / "none", "l2e.method=none"),
        "l2e": train(config, tmp_path / "l2e"),
        "silence": train(config, tmp_path / "silence", "l2e.method=silence"),
    }
    none, l2e, silence = (rows[-1] for rows in arms.values())
    assert none["lm_loss"] != l2e["lm_loss"]
    assert arms["none"][1]["lm_loss"] == arms["l2e"][1]["lm_loss"]  # selects from step 2 on
    assert list(l2e["l2e"]) == ["1"]
    assert l2e["l2e"]["1"]["selected_fraction"] > 0
    assert silence["layer_worth"] == {"1": 0.0, "together": 0.0}
    assert none["layer_worth"]["1"] != 0
    assert none["layer_worth"]["1"] == none["layer_worth"]["together"]
    assert list(none["monitor"]) == ["0", "1"]
    assert 0 <= none["monitor"]["1"]["fkr"] <= 1


def test_mistakes(config, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"knows nothing of train\.dtype.*; evaluate\.tasks"):
        train(config, tmp_path, "train.dtype=bf16", 'evaluate.tasks=["sciq"]')
    train(config, tmp_path, "train.steps=1")
    words = ["--config", str(config), "--run-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="holds a run already"):
        experiment.train(words, PROGRAM)
    program = experiment.load_program(PROGRAM)
    program.loss_of = lambda model, tokens: model(tokens).logits.mean() * float("nan")
    monkeypatch.setattr(experiment, "load_program", lambda _: program)
    with pytest.raises(ValueError, match=r"loss of step 1 is nan: lower optimizer\.learning_rate"):
        train(config, tmp_path / "nan", "l2e.method=none")
