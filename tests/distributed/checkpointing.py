"""Tiny runs for the checkpoint tests: an engine of any layout, fed with fixed random tokens."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs import Config
from configs.loading import validate
from launch.checkpoint.optimizer_state import MASTER, OptimizerState
from launch.engine.engine import Engine, build
from launch.engine.layout import release_layout

SEQUENCE = 16
BATCH = 4
VOCABULARY = 300  # pads to 384 on one tensor-parallel rank, 512 on two or four


def make_config(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    zero: int = 1,
    dtype: str = "fp32",
    micro: int = 1,
    recompute: bool = False,
    **sections: dict[str, Any],
) -> Config:
    """Two blocks of width 32, all inhibited from the third step on; AdamW with Pythia's decay."""
    raw: dict[str, Any] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": SEQUENCE,
        },
        "l2e": {
            "method": "regularize",
            "layers": "all",
            "gradient_ratio": 0.1,
            "late_start_step": 2,
        },
        "data": {"path": "unused", "sequence_length": SEQUENCE},
        "optimizer": {"learning_rate": 1e-2, "eps": 1e-5},
        "parallel": {
            "tensor": tensor,
            "pipeline": pipeline,
            "activation_checkpointing": recompute,
        },
        "train": {"global_batch_size": BATCH, "micro_batch_size": micro, "dtype": dtype},
        "deepspeed": {"zero_optimization": {"stage": zero}},
    }
    for section, keys in sections.items():
        raw[section] = raw.get(section, {}) | keys
    config, problems = validate(raw)
    assert not problems, problems
    return config


@contextmanager
def running(config: Config) -> Iterator[Engine]:
    """An engine, and no trace of its process groups after it."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # what a launcher would have set
    try:
        yield build(config)
    finally:
        release_layout()


def train(engine: Engine, first: int, steps: int) -> list[float]:
    """Losses of steps `first`, ...: the same global batches whatever the layout."""
    return [
        float(engine.train_step(batches(engine, step), 1e-2))
        for step in range(first, first + steps)
    ]


def batches(engine: Engine, step: int) -> Iterator[Tensor]:
    """This rank's micro-batches of one step, its part of the global batch."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    layout = engine.layout
    own = tokens.chunk(layout.data_size)[layout.data_rank]
    yield from own.split(engine.config.train.micro_batch_size)


def everything(engine: Engine) -> dict[str, Tensor]:
    """All numbers of an engine's state that this rank can see, by name."""
    optimizer = OptimizerState(engine.optimizer)
    state = {
        f"{kind} {name}": optimizer.read(parameter, kind).clone()
        for name, parameter in engine.named_parameters()
        for kind in (MASTER, *optimizer.moments)
    }
    state["optimizer steps"] = torch.tensor(optimizer.steps)
    if engine.controller is not None:
        state |= {f"l2e {name}": t for name, t in engine.controller.state_dict().items()}
    return state


def trained_state(engine: Engine) -> dict[str, Tensor]:
    """`everything` that an update changes; the statistics of activations are not among it."""
    return {name: t for name, t in everything(engine).items() if not name.startswith("l2e ")}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit for bit the same, or that only one side has."""
    names = one.keys() | other.keys()
    return sorted(
        name
        for name in names
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )


def folder_of(path: str | Path) -> Path:
    return Path(path) / "checkpoints"
