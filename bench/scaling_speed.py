"""The whole trainer on 1, 2 and 4 processes: tokens/s of `launch/pretrain.py`, one global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.random_tokens import write_random_tokens
from bench.timing import estimate

ROOT = Path(__file__).resolve().parents[1]
GLOBAL_BATCH = 16
WARMUP = 4
CONFIGURATION: dict[str, dict] = {
    "model": {"preset": "14m"},
    "l2e": {"late_start_step": 2},
    "data": {"sequence_length": 256},
    "train": {"global_batch_size": GLOBAL_BATCH, "dtype": "fp32"},
    "checkpoint": {"interval": 0},
    "evaluate": {"interval": 0, "batches": 1},
    "logging": {"interval": 1, "tensorboard": False},
    "deepspeed": {"zero_optimization": {"stage": 1}},
}


def measure(counts: list[int], steps: int) -> list[dict]:
    """Tokens/s for each number of processes, the first few steps left out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_tokens(folder / "tokens", 2**22, vocab_size=50257)
        return [run(folder, count, steps) for count in counts]


def run(folder: Path, processes: int, steps: int) -> dict:
    """One training run of `steps` steps on `processes` processes of one thread each."""
    configuration = CONFIGURATION | {
        "data": CONFIGURATION["data"] | {"path": str(folder / "tokens")},
        "train": CONFIGURATION["train"]
        | {"steps": steps, "micro_batch_size": GLOBAL_BATCH // processes},
    }
    (folder / "config.json").write_text(json.dumps(configuration))
    target = folder / f"run_{processes}"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, "launch/pretrain.py"]
    command += ["--config", str(folder / "config.json"), "--run-dir", str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    lines = (target / "metrics.jsonl").read_text().splitlines()[WARMUP:]
    rates = [json.loads(line)["tokens_per_second"] for line in lines]
    return {"processes": processes, "tokens_per_second": estimate(rates).as_dict()}
