"""`manifest.json`: what would have to be the same for the same numbers to come out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.files import read_json
from launch.engine.engine import Engine
from launch.engine.hardware import describe
from launch.training.folder import MANIFEST, is_own, replace
from launch.training.run import Run

# What of the environment may change numbers or speed, and nothing else of it: there are secrets.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG"),
    *("NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED", "TRITON_INTERPRET"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "GLOO_SOCKET_IFNAME"),
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
)
PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "numpy", "tokenizers")


def write(run: Run, engine: Engine, data: dict[str, Any], resume: Path | None) -> None:
    """Write the manifest of a run; collective, the first rank writes.

    resume: the checkpoint that it goes on from. What the run's first manifest says of the initial
    weights stays; the manifests before this one are kept.
    """
    path = run.folder / MANIFEST
    known = None
    if run.process.is_first and is_own(run.folder, resume):
        known = (read_json(path, run.say) or {}).get("initial_std")
    told = [known]
    dist.broadcast_object_list(told)
    deviations = told[0] or initial_deviations(engine)
    if not run.process.is_first:
        return
    manifest = circumstances() | {
        "launcher": run.process.launcher,
        "resumed_from": None if resume is None else str(resume),
        "layout": str(engine.layout),
        "hardware": describe(engine.device),
        "data": data,
        "initial_std": deviations,
    }
    replace(path, json.dumps(manifest, indent=2) + "\n")


def environment() -> dict[str, str]:
    """The variables of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def versions() -> dict[str, str]:
    """Of the packages that compute."""
    return {name: metadata.version(name) for name in PACKAGES}


def circumstances() -> dict[str, Any]:
    """What any program of this repository can say of itself now."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "environment": environment(),
    }


def git_commit() -> str | None:
    """The commit of the code that runs, with '+' behind it where files have changed since."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = run_git(root, "rev-parse", "HEAD")
        return commit + ("+" if run_git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_git(root: Path, *arguments: str) -> str:
    """What git prints."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@torch.no_grad()
def initial_deviations(engine: Engine) -> dict[str, float]:
    """The measured standard deviation of every weight matrix, all its shards together.

    Sums over the shards of a tensor are added over tensor-parallel ranks, and the stages' tables
    are joined. ZeRO-3 keeps no whole parameter on a rank; there the table is left empty.
    """
    table: dict[str, float] = {}
    for name, parameter in engine.named_parameters():
        if parameter.dim() < 2 or hasattr(parameter, "ds_id"):
            continue
        values = parameter.double()
        sums = torch.stack(
            [values.sum(), values.square().sum(), torch.tensor(float(values.numel())).to(values)]
        )
        if getattr(parameter, "tensor_model_parallel", False):
            dist.all_reduce(sums, group=engine.layout.tensor_group)
        total, squares, count = sums.tolist()
        table[name] = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    return engine.of_all_stages(table)
