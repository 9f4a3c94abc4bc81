"""What `l2e.kernels` does to observe activations, on a CPU in one pass, in C; and to correct the
gradient of what is selected.

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


def observe(
    pre: Tensor, arguments: KernelArguments, sums: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """`kernels.observe`, for activations [rows, neurons] of one of `DTYPES`."""
    assert (arguments.activation, arguments.bias) == (None, None), "not activated yet"
    substitute = arguments.substitute if arguments.method == "deactivate" else None
    read = (pre, arguments.mean, arguments.threshold, arguments.least, substitute, sums)
    assert all(tensor is None or tensor.is_contiguous() for tensor in read)
    neurons = pre.shape[1]

    def columns(first: int) -> list[tuple[Tensor, Tensor, float]]:
        last = min(first + WIDTH, neurons)
        return _columns(pre, arguments, substitute, sums, first, last)

    blocks = range(0, neurons, WIDTH)
    threads = 1 if pre.numel() <= ALONE else min(torch.get_num_threads(), len(blocks))
    found = map(columns, blocks) if threads == 1 else _pool(threads).map(columns, blocks)
    parts = [part for of_columns in found for part in of_columns]
    entries, values = _joined([part[0] for part in parts]), _joined([part[1] for part in parts])
    loss = sum(logs for _, _, logs in parts)
    if sums is not None:
        sums[-1].add_(loss)
    return entries, values if substitute is None else values.to(pre.dtype), loss


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _columns(
    pre: Tensor,
    arguments: KernelArguments,
    substitute: Tensor | None,
    sums: Tensor | None,
    first: int,
    last: int,
) -> list[tuple[Tensor, Tensor, float]]:
    """Of some columns, some rows at a time: numbers and values of the selected entries, and the
    sum of their logarithms."""
    observe_rows, (rows, neurons) = library().observe, pre.shape
    threshold = arguments.threshold
    masked = threshold is not None and threshold.dtype == torch.bool
    slice_rows = kernels.rows_of_slice(pre)
    step = max(1, CALL_ENTRIES // (WIDTH * slice_rows)) * slice_rows
    finds = arguments.method != "none" and threshold is not None
    room = min(step, rows) * (last - first) if finds else 0
    entries = arguments.mean.new_empty(room, dtype=torch.int32)
    values = arguments.mean.new_empty(room)
    found = []
    for top in range(0, rows, step):
        logs = ctypes.c_double(0)
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
            _pointer(arguments.least),
            _pointer(substitute),
            _pointer(sums),
            entries.data_ptr() if room else None,
            values.data_ptr() if room else None,
            ctypes.byref(logs),
        )
        count *= finds
        found.append((entries[:count].clone(), values[:count].clone(), logs.value))
    return found


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def correct(
    to_pre: Tensor,
    grad: Tensor,
    pre: Tensor,
    activation: str,
    entries: Tensor,
    values: Tensor | None,
    *,
    scale: float = 1.0,
    factor: float = 0.0,
) -> None:
    """`kernels.correct`, for gradients of one of `DTYPES`."""
    grad, pre, laid_out = grad.contiguous(), pre.contiguous(), to_pre.contiguous()
    library().correct(
        grad.data_ptr(),
        pre.data_ptr(),
        pre.dtype == torch.bfloat16,
        kernels.APPROXIMATE[activation] == "tanh",
        entries.data_ptr(),
        _pointer(values),
        len(entries),
        scale,
        factor,
        laid_out.data_ptr(),
    )
    if laid_out is not to_pre:
        to_pre.copy_(laid_out)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="l2e")


@cache
def library() -> ctypes.CDLL:
    """The C functions.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: what it made cannot be loaded.
    """
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory(prefix="l2e-") as folder:
        made = Path(folder) / "native_kernels.so"
        command = [*_compiler(), *FLAGS, "-o", str(made), str(source), "-lm"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
        )
        if done.returncode:
            message = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
            raise RuntimeError(f"{command[0]} says: {message}")
        loaded = ctypes.CDLL(str(made))
    pointer, flag, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    loaded.observe.argtypes = [pointer, flag, *[number] * 6, *[pointer] * 9]
    loaded.observe.restype = number
    pair = pointer, pointer
    loaded.correct.argtypes = [*pair, flag, flag, *pair, number, real, real, pointer]
    loaded.correct.restype = None
    return loaded


def _compiler() -> list[str]:
    if named := shlex.split(os.environ.get("CC", "")):
        return named
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise RuntimeError("there is no C compiler: install gcc or clang, or name one in CC")
