"""What the machine can do: the peak that MFU is a share of."""

from __future__ import annotations

import ctypes
import platform
import time
from functools import cache

import torch

from configs import Config, ConfigError, Problem
from l2e.memory import GIB, exhausted, host_bytes
from l2e.problems import first_line
from launch.engine.joining import Joined, is_first_to_tell
from launch.planning import cost
from launch.planning.layouts import layout_of
from launch.planning.remedies import advice
from launch.planning.speed import GPU, GPUS

# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_INT = -1, -3, 2**31 - 1

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def refuse_unsupported(config: Config) -> None:
    """Raise a ConfigError for what this machine cannot run, before anything is started."""
    if torch.cuda.is_available():
        return
    problems = []
    if config.parallel.sequence:
        reason = "megatron-core's sequence parallelism needs CUDA, and there is none here"
        problems.append(Problem("parallel.sequence", True, reason, "set it to false"))
    if config.train.dtype == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        reason = "this processor has no fp16 arithmetic"
        problems.append(Problem("train.dtype", "fp16", reason, "set it to bf16 or fp32"))
    if problems:
        raise ConfigError("this machine", problems)


def refuse_beyond_memory(config: Config, joined: Joined) -> None:
    """Raise ValueError where weights, gradients and optimizer alone need more than there is.

    Before anything is allocated: a machine whose memory runs out may take other people's work
    along. What DeepSpeed is to keep elsewhere (offloading) is not counted, so then nothing is said.
    """
    process = joined.process
    zero = config.deepspeed.get("zero_optimization", {})
    if any(key.startswith("offload") for key in zero):
        return
    parts = cost.peak_memory(config.model, layout_of(config, process.world_size))
    needed = parts["weights"] + parts["gradients"] + parts["optimizer"]
    if torch.cuda.is_available():
        place, there = "this GPU", torch.cuda.mem_get_info()[1]
    else:
        needed *= process.local_size or 1
        place, there = "this machine", host_bytes()
    if needed > there:
        raise ValueError(
            f"weights, gradients and optimizer take {needed / GIB:,.1f} GiB, and {place} has "
            f"{there / GIB:,.1f}; {advice_of_host(config, joined)}"
        )


def advice_of_host(config: Config, joined: Joined) -> str:
    """The plan and the remedies, by one rank of each host: all would say the same."""
    if not is_first_to_tell(joined, "memory"):
        return "another rank of this host says what would help"
    return advice(config, joined.process.world_size, gpu_here())


def in_words(error: BaseException, config: Config, joined: Joined) -> str | None:
    """What a failed allocation means to a user; None for other errors."""
    whose = exhausted(error)
    if whose is None:
        return None
    reason = first_line(error)[:300]
    device = torch.device("cuda") if whose == "GPU" else torch.device("cpu")
    name = describe(device) if whose == "GPU" else f"{host_bytes() / GIB:.1f} GiB, shared by all"
    return f"{whose} memory is exhausted ({name}): {reason}\n{advice_of_host(config, joined)}"


def gpu_here() -> GPU | None:
    """What is known of this machine's GPU; None of another kind, or without one."""
    if not torch.cuda.is_available():
        return None
    try:
        name = torch.cuda.get_device_name()
    except RuntimeError:  # of CUDA, which needs some of the host's memory to begin with
        return None
    return next((gpu for known, gpu in GPUS.items() if known.upper() in name), None)


def keep_freed_memory() -> None:
    """Let the C library keep memory that work on a CPU frees, for the next step or batch.

    By default glibc hands large blocks back, and fetching their pages anew takes about a tenth of
    a small model's step. Other libraries stay as they are.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            library.mallopt(threshold, LARGEST_INT)


def take_gpu(joined: Joined) -> int:
    """Let this process use the GPU that is its own; its number among those that it sees.

    Raises ValueError if there are fewer GPUs than processes: NCCL needs one for each.
    """
    process = joined.process
    assert process.local_rank is not None, "join has found it"
    gpu = gpu_of(process.local_rank, torch.cuda.device_count())
    torch.cuda.set_device(gpu)
    properties = torch.cuda.get_device_properties(gpu)
    place = f"gpu/{joined.hosts[process.rank]}/{properties.uuid}"
    owner = joined.store.compare_set(place, "", str(process.rank)).decode()
    if owner != str(process.rank):
        raise ValueError(
            f"ranks {owner} and {process.rank} have one GPU, {properties.name}: start as many "
            "processes a host as it has GPUs, or give each task one of its own"
        )
    return gpu


def gpu_of(local_rank: int, visible: int) -> int:
    """Which of the `visible` GPUs a node's process takes; a task may see none but its own.

    Raises ValueError if there are fewer GPUs than processes.
    """
    if visible == 1:  # srun --gpus-per-task 1
        return 0
    if local_rank >= visible:
        raise ValueError(
            f"this is process {local_rank} (from 0) of its node, which shows it {visible} GPUs; "
            "start as many processes a node as it has GPUs, or give each task one"
        )
    return local_rank


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process"


def emulated(device: torch.device, dtype: str) -> str | None:
    """A warning where the processor computes in `dtype` only by way of others."""
    if (
        device.type == "cpu"
        and dtype == "bf16"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return "WARNING: this processor has no bf16 arithmetic; train.dtype fp32 is much faster"
    return None


def datasheet_peak(device: torch.device, dtype: str) -> float | None:
    """Dense FLOP/s of a GPU that is known here; fp32 is true fp32, not TF32."""
    if device.type != "cuda":
        return None
    gpu = gpu_here()
    if gpu is None:
        return None
    return gpu.fp32_flops if dtype == "fp32" else gpu.flops


@cache
def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of one process's device: a known GPU's datasheet number, elsewhere the best of a few
    matrix products measured now (0.1 s)."""
    return datasheet_peak(device, dtype) or measured_peak(device, TORCH_DTYPES[dtype])


def describe_peak(device: torch.device, dtype: str) -> str:
    """The peak in words, and where it comes from."""
    source = "measured" if datasheet_peak(device, dtype) is None else "datasheet"
    return f"{peak_flops(device, dtype) / 1e12:.3g} TFLOP/s, {source}"


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of the best of a few square matrix products."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
