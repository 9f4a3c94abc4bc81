"""Parts of training as a run trains: a step through DeepSpeed, loss curves, resuming."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu_parts.part import (
    CUDA,
    SHAPES,
    TINY,
    Part,
    drain,
    kernel_times,
)
from bench.random_tokens import write_random_tokens
from launch.planning.cost import flops_per_token

ROOT = Path(__file__).resolve().parents[2]
CPU_CURVE = ROOT / "bench" / "results" / "gpu" / "cpu_curve_70m.json"
# Largest differences of the training loss from the CPU's fp32 run, in nats: docs/gpu.md.
TRAINING_LIMITS = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}


def step(part: Part) -> None:
    """One optimizer step as training takes it, with and without measuring, and where it waits."""
    import configs

    batch, length = (2, 64) if part.smoke else SHAPES["70m"]
    with tempfile.TemporaryDirectory() as folder:
        path = write_config(
            Path(folder),
            part.smoke,
            train__dtype="bf16" if CUDA else "fp32",
            train__micro_batch_size=batch,
            train__global_batch_size=2 * batch,
            train__compile=CUDA,
            data__sequence_length=length,
        )
        config = configs.load(str(path))
        with engine_for(config) as engine:
            part.save(blocks=engine.compiled)
            drawn = torch.randint(500, (2 * batch, length + 1))
            drawn = drawn.pin_memory() if CUDA else drawn

            def one(measured: bool = False) -> None:
                engine.measure(measured)
                engine.train_step(iter(drawn.split(batch)), 1e-4)

            begin = time.monotonic()
            for _ in range(5):
                one()
            one(True)
            drain()
            part.save(first_six_steps_seconds=time.monotonic() - begin)
            step_times(part, one, flops_per_token(config.model, length), 2 * batch * length)
            if CUDA:
                with part.attempt("waits"):
                    part.save(
                        host_waits={"plain": waits(one), "measured": waits(lambda: one(True))}
                    )
                with part.attempt("profile"):
                    part.save(
                        profile=kernel_times(one), profile_measured=kernel_times(lambda: one(True))
                    )


def step_times(part: Part, one: Callable[..., None], flops: float, tokens: int) -> None:
    """Seconds of plain and measured steps in turn, and their peak memory."""

    def timed(measured: bool, count: int) -> float:
        drain()
        begin = time.perf_counter()
        for _ in range(count):
            one(measured)
        drain()
        return (time.perf_counter() - begin) / count

    turns = [(timed(False, 5), timed(True, 2)) for _ in range(1 if part.smoke else 5)]
    plain, measured = (sorted(times)[len(turns) // 2] for times in zip(*turns, strict=True))
    part.save(
        plain_seconds=plain,
        measured_seconds=measured,
        measured_adds_percent=100 * (measured / plain - 1),
        tokens_per_second=tokens / plain,
        achieved_tflops=flops * tokens / plain / 1e12,
    )
    if CUDA:
        peaks = []
        for kind in (False, True):
            torch.cuda.reset_peak_memory_stats()
            one(kind)
            drain()
            peaks.append(part.peak_gigabytes)
        part.save(peak_memory_GB={"plain": peaks[0], "measured": peaks[1]})


def waits(call: Callable[[], object]) -> dict[str, int]:
    """Where the host waits for the GPU within a call, and how often."""
    places: Counter[str] = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchroniz" in str(message):
            stack = [f for f in traceback.extract_stack() if "/torch/" not in f.filename][:-1]
            names = [f"{Path(f.filename).name}:{f.lineno}" for f in reversed(stack[-4:])]
            places[" <- ".join(names)] += 1

    shown = warnings.showwarning
    drain()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode(1)
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(0)
            warnings.showwarning = shown
    return dict(places)


def training(part: Part) -> None:
    """70M for twenty steps in several ways beside the loss curve of an fp32 run on a CPU."""
    import configs

    ways: dict[str, dict[str, Any]] = {
        "fp32, plain": {"train__dtype": "fp32", "l2e__kernels": "plain"},
        "fp32": {"train__dtype": "fp32"},
        "bf16": {"train__dtype": "bf16"},
        "bf16, again": {"train__dtype": "bf16"},
        "fp16": {"train__dtype": "fp16"},
        "bf16, compiled": {"train__dtype": "bf16", "train__compile": True},
        "bf16, no L2E": {"train__dtype": "bf16", "l2e__method": "none"},
    }
    if not CUDA:
        ways = {name: ways[name] for name in ("fp32, plain", "bf16")}
    reference = None if part.smoke else json.loads(CPU_CURVE.read_text())["lm_loss"]
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in ways.items():
            with part.attempt(name):
                path = write_config(Path(folder), part.smoke, **changes)
                curves[name] = train(configs.load(str(path)), Path(folder))
                reference = reference or curves[name]  # tiny shapes' is their own fp32 run
                apart = largest_difference(curves[name], reference)
                part.save(**{name: {"lm_loss": curves[name], "apart_from_cpu": apart}})
                limit = TRAINING_LIMITS[name[:4]]
                if not apart <= limit:
                    part.fail(f"{name}: {apart:.1e} from the CPU's fp32 loss; at most {limit}")
    if "bf16, again" in curves:
        part.save(two_bf16_runs_apart=largest_difference(curves["bf16"], curves["bf16, again"]))


def train(config: Any, folder: Path) -> list[float]:
    """The loss of each step."""
    from launch.training import data
    from launch.training.position import Position
    from launch.training.schedule import learning_rate

    start = Position()
    corpus = data.open_corpus(config, folder, data.fetch(config, folder), start)
    losses = []
    with engine_for(config) as engine:
        batches = corpus.training_batches(start, engine.layout)
        for number in range(config.train.steps):
            losses.append(engine.train_step(batches, learning_rate(config, number)))
    return [float(value) for value in losses]


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of two curves, in nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def resume(part: Part) -> None:
    """The command itself: twenty steps at once, and ten and ten; the same losses?"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_config(folder, part.smoke, train__dtype="bf16" if CUDA else "fp32")

        def pretrain(run_dir: str, *extra: str) -> list[float]:
            command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(path)]
            command += ["--run-dir", str(folder / run_dir), *extra]
            subprocess.run(command, check=True, timeout=max(10, part.left), cwd=ROOT)
            lines = (folder / run_dir / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line)["lm_loss"] for line in lines]

        whole = pretrain("whole")
        halves = ["--set", "train.stop_after=10", "--set", "checkpoint.interval=10"]
        pretrain("parts", *halves)
        resumed = pretrain("parts", "--resume", "auto")
        part.save(steps=len(resumed), largest_difference=largest_difference(resumed, whole))


@contextmanager
def engine_for(config: Any) -> Iterator[Any]:
    """The engine that training builds, in a process group of its own."""
    from launch.engine.engine import build
    from launch.engine.groups import process_group
    from launch.engine.layout import release_layout
    from launch.engine.processes import find

    with process_group(find()):
        try:
            yield build(config)
        finally:
            release_layout()


def write_config(folder: Path, smoke: bool, **changes: Any) -> Path:
    """A configuration of 70M (or a tiny model) on few different tokens, which are soon learnt."""
    if not (folder / "tokens.bin").exists():
        write_random_tokens(folder / "tokens", 2**16 if smoke else 2**25, vocab_size=500)
    tiny = TINY.model_dump(include={"num_layers", "hidden_size", "num_attention_heads"})
    config: dict[str, dict[str, Any]] = {
        "model": tiny | {"vocab_size": 512} if smoke else {"preset": "70m"},
        "l2e": {"late_start_step": 3, "layers": "mid2"},
        "data": {"path": str(folder / "tokens"), "sequence_length": 64 if smoke else 256},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"type": "constant", "warmup_steps": 5},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 4, "dtype": "fp32"},
        "checkpoint": {"interval": 0},
        "evaluate": {"interval": 0, "batches": 1},
        "logging": {"interval": 1, "tensorboard": False},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        config[section][key] = value
    path = folder / f"config_{len(list(folder.glob('config_*')))}.json"
    path.write_text(json.dumps(config))
    return path
