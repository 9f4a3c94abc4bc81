"""What `l2e.kernels` does to observe activations, on a CPU in one pass, in C.

The compiler that the machine has (CC, else cc, gcc or clang) makes it for this very CPU in a
fraction of a second, once a process; nothing of it is kept. Sums are those of `l2e.kernels`, and
so is what is selected.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from l2e import kernels
from l2e.kernels import KernelArguments

DTYPES = (torch.float32, torch.bfloat16)
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
COMPILE_SECONDS = 60
WIDTH = 512  # columns of a call at most, as in the C file
CALL_ENTRIES = 2**20
ALONE = 2**18  # entries that are not worth a second thread


def observe(pre: Tensor, arguments: KernelArguments, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """`kernels.observe`, for activations [rows, neurons] of one of `DTYPES`."""
    assert (arguments.activation, arguments.bias) == (None, None), "not activated yet"
    for read in (pre, arguments.mean, arguments.threshold, sums):
        assert read is None or read.is_contiguous()
    neurons = pre.shape[1]

    def columns(first: int) -> list[tuple[Tensor, Tensor]]:
        return _columns(pre, arguments, sums, first, min(first + WIDTH, neurons))

    blocks = range(0, neurons, WIDTH)
    threads = 1 if pre.numel() <= ALONE else min(torch.get_num_threads(), len(blocks))
    found = map(columns, blocks) if threads == 1 else _pool(threads).map(columns, blocks)
    parts = [part for of_columns in found for part in of_columns]
    return kernels.of_selected(parts, arguments, pre.dtype, sums)


def _columns(
    pre: Tensor, arguments: KernelArguments, sums: Tensor | None, first: int, last: int
) -> list[tuple[Tensor, Tensor]]:
    """Numbers and deviations of the selected entries of some columns, some rows at a time."""
    observe_rows, (rows, neurons) = function(), pre.shape
    threshold = arguments.threshold
    masked = threshold is not None and threshold.dtype == torch.bool
    slice_rows = kernels.rows_of_slice(pre)
    step = max(1, CALL_ENTRIES // (WIDTH * slice_rows)) * slice_rows
    finds = arguments.method != "none" and threshold is not None
    room = min(step, rows) * (last - first) if finds else 0
    entries = arguments.mean.new_empty(room, dtype=torch.int64)
    deviations = arguments.mean.new_empty(room)
    found = []
    for top in range(0, rows, step):
        count = observe_rows(
            pre.data_ptr(),
            pre.dtype == torch.bfloat16,
            neurons,
            top,
            min(top + step, rows),
            first,
            last,
            slice_rows,
            arguments.mean.data_ptr(),
            None if threshold is None or masked else threshold.data_ptr(),
            threshold.data_ptr() if threshold is not None and masked else None,
            None if sums is None else sums.data_ptr(),
            entries.data_ptr() if room else None,
            deviations.data_ptr() if room else None,
        )
        if finds:
            found.append((entries[:count].clone(), deviations[:count].clone()))
    return found


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="l2e")


@cache
def function() -> Callable[..., int]:
    """The C function.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: what it made cannot be loaded.
    """
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory(prefix="l2e-") as folder:
        library = Path(folder) / "native_kernels.so"
        command = [*_compiler(), *FLAGS, "-o", str(library), str(source)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
        if done.returncode:
            message = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
            raise RuntimeError(f"{command[0]} says: {message}")
        found = ctypes.CDLL(str(library)).observe
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.argtypes = [pointer, ctypes.c_int, *[number] * 6, *[pointer] * 6]
    found.restype = number
    return found


def _compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise RuntimeError("there is no C compiler: install gcc or clang, or name one in CC")
