"""The keys of the section `deepspeed` that reach DeepSpeed, and what each may hold.

DeepSpeed takes an unknown key for none and a wrong value as it comes; so both are told here, before
anything is started. Whatever else it knows is either filled in from other sections or done by this
trainer itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from l2e.problems import Problem

SWITCH = "true or false"
SIZE = range(0, 2**40)  # numbers of elements
PRECISION = ("fp32", "bf16", "fp16")
ANYTHING: dict[str, Any] = {}  # a section that DeepSpeed checks itself

# A range: a whole number in it. A tuple: one of these. A dict: a section of keys.
KNOWN: dict[str, Any] = {
    "zero_optimization": {
        "stage": range(4),
        "contiguous_gradients": SWITCH,
        "reduce_scatter": SWITCH,
        "reduce_bucket_size": SIZE,
        "use_multi_rank_bucket_allreduce": SWITCH,
        "allgather_partitions": SWITCH,
        "allgather_bucket_size": SIZE,
        "overlap_comm": SWITCH,
        "offload_param": ANYTHING,
        "offload_optimizer": ANYTHING,
        "sub_group_size": SIZE,
        "stage3_prefetch_bucket_size": SIZE,
        "stage3_param_persistence_threshold": SIZE,
        "stage3_model_persistence_threshold": SIZE,
        "stage3_max_live_parameters": SIZE,
        "stage3_max_reuse_distance": SIZE,
        "round_robin_gradients": SWITCH,
        "zero_hpz_partition_size": range(1, 2**16),
        "zero_quantized_weights": SWITCH,
        "zero_quantized_gradients": SWITCH,
        "log_trace_cache_warnings": SWITCH,
        "enable_sanity_checks": SWITCH,
    },
    "fp16": {
        "enabled": SWITCH,
        "loss_scale": range(0, 2**32),
        "initial_scale_power": range(0, 33),
        "loss_scale_window": range(1, 2**31),
        "hysteresis": range(1, 2**31),
        "consecutive_hysteresis": SWITCH,
        "min_loss_scale": range(1, 2**32),
    },
    "data_types": {"grad_accum_dtype": PRECISION},
    "communication_data_type": PRECISION,
    "seq_parallel_communication_data_type": PRECISION,
    "prescale_gradients": SWITCH,
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "disable_python_gc": SWITCH,
    "disable_allgather": SWITCH,
    "timers": {"throughput": {"enabled": SWITCH, "synchronized": SWITCH}},
    "comms_logger": {
        "enabled": SWITCH,
        "verbose": SWITCH,
        "prof_all": SWITCH,
        "debug": SWITCH,
    },
    "flops_profiler": {
        "enabled": SWITCH,
        "profile_step": range(1, 2**31),
        "module_depth": range(-1, 2**16),
        "top_modules": range(1, 2**16),
        "detailed": SWITCH,
    },
}


def check_keys(
    given: dict[str, Any], known: dict[str, Any], name: str = "deepspeed"
) -> Iterator[Problem]:
    """What of a section does not reach DeepSpeed, or not as it is meant."""
    for key, value in given.items():
        path, wanted = f"{name}.{key}", known.get(key)
        if wanted is None:
            near = difflib.get_close_matches(key, known, n=1)
            fix = f"did you mean {name}.{near[0]}?" if near else f"known are {', '.join(known)}"
            yield Problem(path, value, "no key of DeepSpeed's that is passed on", fix)
        elif isinstance(wanted, dict):
            if not isinstance(value, dict):
                yield Problem(path, value, "not a section", f"write {example(wanted)}")
            elif wanted is not ANYTHING:
                yield from check_keys(value, wanted, path)
        elif not fits(value, wanted):
            yield Problem(path, value, "not what it may hold", f"give {in_words(wanted)}")


def fits(value: Any, wanted: Any) -> bool:
    """Whether a key's value is what DeepSpeed wants there."""
    if isinstance(wanted, range):
        return isinstance(value, int) and not isinstance(value, bool) and value in wanted
    return isinstance(value, bool) if wanted == SWITCH else value in wanted


def in_words(wanted: Any) -> str:
    if isinstance(wanted, range):
        return f"a whole number from {wanted.start} to {wanted.stop - 1}"
    return wanted if isinstance(wanted, str) else f"one of {', '.join(wanted)}"


def example(section: dict[str, Any]) -> str:
    """What a section may look like."""
    return '{"stage": 1}' if "stage" in section else "{ }"
