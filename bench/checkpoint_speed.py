"""Saving and loading a checkpoint: MB/s beside the disk's own, and the peak memory of a save.

One process, random weights, AdamW's moments in place. The disk is measured by one plain file of
about the same size, written and synced in the same folder, before and after.

    python bench/checkpoint_speed.py --preset 410m --zero 0 --folder /scratch
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.machine import default_device, describe_machine
from configs.loading import validate
from launch import checkpoint
from launch.checkpoint import folders
from launch.checkpoint.optimizer_state import OptimizerState
from launch.engine.engine import Engine, build
from launch.engine.groups import process_group
from launch.engine.processes import find
from launch.planning.cost import parameters

MEGABYTE = 10**6


def main() -> None:
    options = parse_arguments()
    os.environ.setdefault("LOCAL_RANK", "0")
    raw = {
        "model": {"preset": options.preset},
        "data": {"path": "unused"},
        "train": {"global_batch_size": 1, "micro_batch_size": 1, "dtype": options.dtype},
        "deepspeed": {"zero_optimization": {"stage": options.zero}},
    }
    config, problems = validate(raw)
    if config is None or problems:
        raise ValueError("; ".join(map(str, problems)))
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_speed_", dir=options.folder))
    try:
        with process_group(find()):
            result = measure(build(config), folder)
    finally:
        shutil.rmtree(folder)
    machine = {"machine": describe_machine(default_device()), "setting": vars(options)}
    print(json.dumps(machine | result, indent=2))


def measure(engine: Engine, folder: Path) -> dict:
    """Everything about one engine's checkpoint."""
    optimizer = OptimizerState(engine.optimizer)
    optimizer.create()
    for state in optimizer.basic.state.values():  # zeros are cheap for some disks
        for value in state.values():
            if torch.is_tensor(value) and value.is_floating_point():
                value.uniform_()
    held = state_bytes(engine)
    size = 3 * 4 * parameters(engine.config.model)
    disk = [disk_speed(folder, size)]
    before = resident("VmRSS")
    reset_peak()
    saved: list[Path] = []
    save_seconds = seconds(
        lambda: saved.append(checkpoint.save(engine, folder, {"step": 1, "tokens": 0}))
    )
    peak = resident("VmHWM")
    size = sum(path.stat().st_size for path in saved[0].iterdir())
    disk.append(disk_speed(folder, size))
    verify_seconds = seconds(lambda: folders.damage(saved[0]))
    load_seconds = seconds(lambda: checkpoint.load(engine, saved[0]))
    return {
        "megabytes": size / MEGABYTE,
        "disk_megabytes_per_second": [round(speed) for speed in disk],
        "save_megabytes_per_second": round(size / MEGABYTE / save_seconds),
        "verify_megabytes_per_second": round(size / MEGABYTE / verify_seconds),
        "load_megabytes_per_second": round(size / MEGABYTE / load_seconds),
        "model_and_optimizer_megabytes": held / MEGABYTE,
        "save_peak_over_model_and_optimizer": (held + peak - before) / held,
    }


def state_bytes(engine: Engine) -> int:
    """Bytes of the parameters, the optimizer's masters and its moments, each storage once."""
    basic = OptimizerState(engine.optimizer).basic
    tensors: list[torch.Tensor] = [*engine.model.parameters()]
    for master, state in basic.state.items():
        tensors += [master, *(value for value in state.values() if torch.is_tensor(value))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def disk_speed(folder: Path, size: int) -> float:
    """MB/s of writing and syncing one plain file of `size` bytes."""
    block = os.urandom(10 * MEGABYTE)

    def write() -> None:
        with open(folder / "plain", "wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    taken = seconds(write)
    (folder / "plain").unlink()
    return size / MEGABYTE / taken


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def resident(key: str) -> int:
    """Bytes of this process's memory (VmRSS) or its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{key}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="410m", help="Pythia size")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--zero", type=int, default=0, choices=range(4), help="ZeRO stage")
    parser.add_argument("--folder", default=None, help="on the disk to measure (default: /tmp)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
