"""The whole tour on one small model: pretrain with L2E, export, evaluate, and where to look.

Each step is a command that is printed before it runs, so that it can be typed by itself.
"""

from __future__ import annotations

import json
import math
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from launch import cli

CONFIG = "configs/demo.json"
PASSAGE_WORDS, LONGEST_DOCUMENT = 30, 600


def main(arguments: list[str] | None = None) -> None:
    """Run the tour."""
    parser = cli.verb_parser(__doc__)
    cli.add_run_folder(parser)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to pretrain.py"
    )
    options = parser.parse_args(arguments)
    run = (options.run_dir or ROOT / "runs" / "demo").absolute()  # the steps run in ROOT
    began = time.monotonic()
    overrides = [word for setting in options.set for word in ("--set", setting)]
    step("launch/pretrain.py", "--config", CONFIG, "--run-dir", run, "--resume", "auto", *overrides,
         launcher=deepspeed())  # fmt: skip
    exported = run / "results" / "huggingface"
    if not exported.exists():
        step("launch/export.py", "to-hf", "--checkpoint", run, "--output", exported)
    tasks = write_task(run / "results" / "tasks")
    scores = run / "results" / "lambada.json"
    step("launch/evaluate.py", "--checkpoint", exported, "--tasks", "lambada_openai",
         "--task-data", tasks, "--output", scores)  # fmt: skip
    print(table(run, scores))
    print(f"\nall of this took {time.monotonic() - began:.0f} s")
    print(f"curves: {Path(sys.executable).with_name('tensorboard')} --logdir {run.parent}")


def deepspeed() -> list[str]:
    """The launcher with one process on a GPU, or two on a machine without one."""
    import torch

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    processes = 1 if torch.cuda.is_available() else 2
    program = Path(sys.executable).with_name("deepspeed")
    words = ["--num_gpus", str(processes), "--master_port", str(port), "--log_level", "error"]
    return [str(program), *words]


def step(*words: str | Path, launcher: list[str] | None = None) -> None:
    """Print a command and run it to its end."""
    command = (launcher or [sys.executable]) + [str(word) for word in words]
    print(f"\n$ {shlex.join(command)}", flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise ValueError("this step failed; its output above says why")


def write_task(folder: Path) -> Path:
    """LAMBADA's task, to say the last word of a passage, on docstrings the model has not seen."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": passage}) + "\n" for passage in passages()]
    (folder / "lambada_openai_test.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def passages() -> Iterator[str]:
    """Stretches of the held-out docstrings that end in a plain word."""
    from data import builtin

    for document in builtin.documents(builtin.VALIDATION):
        if document["meta"]["pile_set_name"] != "docstrings":
            continue
        words = document["text"].split()
        for end in range(PASSAGE_WORDS, min(len(words), LONGEST_DOCUMENT), PASSAGE_WORDS):
            if words[end - 1].isalpha():
                yield " ".join(words[end - PASSAGE_WORDS : end])


def table(run: Path, scores: Path) -> str:
    """What the run reached, from the files it left behind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation_loss" in line]
    first, last = validations[0], validations[-1]
    bytes_per_token = json.loads((run / "manifest.json").read_text())["data"]["bytes_per_token"]
    bits = last["validation_loss"] / math.log(2) / bytes_per_token
    rows = [
        ("validation loss, step 1", f"{first['validation_loss']:.3f} nats/token"),
        (f"validation loss, step {last['step']}", f"{last['validation_loss']:.3f} nats/token"),
        ("bits per byte", f"{bits:.3f}"),
    ]
    measured = [line for line in lines if line["l2e"]][-1]
    for block, metrics in measured["l2e"].items():
        rows.append((f"block {block}: {describe(metrics)}", ""))
    result: dict[str, Any] = json.loads(scores.read_text())["results"]["lambada_openai"]
    accuracy, error = result["acc"], result["acc_stderr"]
    rows.append(("last word of unseen docstrings", f"{accuracy:.1%} +- {error:.1%} right"))
    width = max(len(name) for name, value in rows if value)
    body = [f"  {name:<{width}}  {value}".rstrip() for name, value in rows]
    return "\n".join(["", "what came out", *body])


def describe(metrics: dict[str, float]) -> str:
    """The Monosemantic Scale of one inhibited block in a line."""
    return (
        f"mean MS {metrics['mean_ms']:.2f}, max {metrics['max_ms']:.0f}, "
        f"{metrics['selected_fraction']:.2%} above tau {metrics['tau']:.2f}, "
        f"std {metrics['std']:.3f}, kurtosis {metrics['kurtosis']:.1f}, "
        f"MLP/residual {metrics['mlp_to_residual']:.2f}"
    )


if __name__ == "__main__":
    cli.run_verb(main)
