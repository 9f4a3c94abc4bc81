"""torch.distributed for the length of a block, with or without a model's layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from configs.schema import Parallel
from launch.engine import hardware
from launch.engine.joining import Joined, join
from launch.engine.layout import initialise_layout, release_layout
from launch.engine.processes import Process, find


@contextmanager
def exported(process: Process, gpu: int | None) -> Iterator[None]:
    """The variables that torch and DeepSpeed read, whatever the launcher called them.

    DeepSpeed takes the GPU with the number LOCAL_RANK; a task that sees its own alone has no other
    than 0. Put back afterwards: a later library would take them for a launcher's.
    """
    before = dict(os.environ)
    os.environ.update(
        RANK=str(process.rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_RANK=str(process.local_rank if gpu is None else gpu),
        MASTER_ADDR=process.address,
        MASTER_PORT=str(process.port),
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def process_group(
    process: Process, joined: Joined | None = None, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[None]:
    """torch.distributed for the length of the block, ended on every way out.

    joined: how the ranks have met, if they have yet.

    gloo aborts a process that leaves without destroying its groups, hence the finally. After an
    error the other ranks may be anywhere, so only a clean end waits for them.
    """
    joined = joined or join(process, timeout)
    process = joined.process
    gpu = hardware.take_gpu(joined) if torch.cuda.is_available() else None
    if gpu is None:
        hardware.keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // (process.local_size or 1)))
    backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
    with exported(process, gpu):
        os.environ.update(joined.interface)
        dist.init_process_group(
            backend,
            store=joined.store,
            rank=process.rank,
            world_size=process.world_size,
            timeout=timeout,
        )
        try:
            yield
            dist.barrier()
        finally:
            dist.destroy_process_group()


@contextmanager
def single_process() -> Iterator[None]:
    """The processes a launcher started (or this one alone), each holding whole models."""
    with process_group(find()):
        initialise_layout(Parallel())
        try:
            yield
        finally:
            release_layout()
