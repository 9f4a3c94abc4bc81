"""Bring an engine of any layout to a checkpoint's state, all of it or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from launch.checkpoint.canonical import all_specs, own_slice, raise_on_all_ranks
from launch.checkpoint.optimizer_state import MASTER, OptimizerState
from launch.checkpoint.stored import L2E, MODEL, RANDOM, StoredCheckpoint
from launch.checkpoint.tensorfile import TensorSpec
from launch.engine.engine import Engine


def load(engine: Engine, folder: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Bring a fresh engine to the state of the checkpoint `folder`; all ranks call it together.

    Any layout, ZeRO stage and dtype may load any other's. `tokenizer` is the run's tokenizer file,
    held against the checkpoint's. Returns what `save` was given.

    Raises:
        ValueError: the checkpoint is of another model, or a tensor is missing or left over; the
            engine's weights are then untouched.
    """
    stored = StoredCheckpoint(folder)
    state = stored.state
    optimizer = OptimizerState(engine.optimizer)
    moments = tuple(state["optimizer"]["moments"])
    expected = {name: spec for stage in all_specs(engine) for name, spec in stage.items()}
    raise_on_all_ranks(lambda: check(engine, stored, expected, moments, tokenizer), stored.cannot)
    if moments:
        optimizer.create()
        raise_on_all_ranks(
            lambda: check_moments(engine, state, optimizer.moments, moments), stored.cannot
        )
    for kind in (MASTER, *moments):
        for name, parameter in engine.named_parameters():
            slices = stored.tensors[kind]
            value = own_slice(engine, parameter, slices[name])
            optimizer.write(parameter, kind, value.to(engine.device))
    if moments:
        optimizer.set_steps(state["optimizer"]["steps"])
    elif dist.get_rank() == 0 and state["step"]:
        print(f"{folder} has no optimizer state: the optimizer starts afresh", flush=True)
    load_l2e(engine, stored.folder)
    load_random(stored.folder)
    for key, value in state["loss_scaler"].items():
        if hasattr(getattr(engine.optimizer, "loss_scaler", None), key):
            setattr(engine.optimizer.loss_scaler, key, value)
    return state


def check(
    engine: Engine,
    stored: StoredCheckpoint,
    expected: dict[str, TensorSpec],
    moments: tuple[str, ...],
    tokenizer: Path | None,
) -> None:
    """The checkpoint is of this very model and tokenizer, and complete, to the last tensor."""
    stored.refuse_another(engine.config.model, tokenizer)
    for kind in (MODEL, *moments):
        found = {
            name: tuple(part.get_shape()) for name, part in stored.tensors.get(kind, {}).items()
        }
        problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
        problems += [f"{name} is unknown to this model" for name in found.keys() - expected.keys()]
        problems += [
            f"{name} has the shape {found[name]} instead of {spec.shape}"
            for name, spec in expected.items()
            if name in found and found[name] != spec.shape
        ]
        if problems:
            raise ValueError(
                f"{stored.folder}, {kind}: {'; '.join(sorted(problems)[:5])}"
                + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
                + ". Nothing was loaded"
            )


def check_moments(
    engine: Engine, state: dict[str, Any], ours: tuple[str, ...], theirs: tuple[str, ...]
) -> None:
    if ours != theirs:
        raise ValueError(
            f"the checkpoint's optimizer is {state['optimizer']['type']} with "
            f"{', '.join(theirs) or 'no moments'}, optimizer.type {engine.config.optimizer.type} "
            f"has {', '.join(ours) or 'none'}; set optimizer.type to "
            f"{state['optimizer']['type']!r}"
        )


def load_l2e(engine: Engine, folder: Path) -> None:
    tensors = load_file(folder / L2E)
    if engine.controller is not None and tensors:
        engine.controller.load_state_dict(tensors)
    elif engine.config.l2e.method != "none" and dist.get_rank() == 0 and not tensors:
        print(f"{folder} has no L2E state: its statistics start afresh", flush=True)


def load_random(folder: Path) -> None:
    """Each rank's random state; a run on another number of ranks starts with its own seeds."""
    states = load_file(folder / RANDOM)
    rank = dist.get_rank()
    if sum(name.endswith(".cpu") for name in states) != dist.get_world_size():
        return
    torch.set_rng_state(states[f"{rank}.cpu"])
    if torch.cuda.is_available() and f"{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])
