"""Runs a function on several gloo processes that meet in a file, and always cleans up."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_on_processes(function: Callable[..., Any], count: int, folder: Path, *args: Any) -> list:
    """Calls function(*args) on `count` ranks of one gloo group; returns each rank's result.

    The function must be importable (defined at a module's top level). A rank that fails fails
    the test with its own traceback. `folder` (pytest's tmp_path) holds the store and results.
    """
    folder = Path(folder) / f"{function.__name__}_{count}_processes"
    folder.mkdir(parents=True)
    multiprocessing.spawn(_run_rank, (function, count, folder, args), nprocs=count, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run_rank(rank: int, function: Callable[..., Any], count: int, folder: Path, args) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count
    )
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
