"""A run's tensors as a checkpoint has them: whole, under their canonical names, and back again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from launch.checkpoint.optimizer_state import local_shape
from launch.checkpoint.tensorfile import TensorSpec
from launch.engine.engine import Engine

# Parameters whose first dimension is the vocabulary, which layouts pad.
VOCABULARY = ("gpt_neox.embed_in.weight", "embed_out.weight")


def full_spec(engine: Engine, name: str, parameter: Parameter) -> TensorSpec:
    """Shape of a parameter without its layout's cuts and padding."""
    shape = list(local_shape(parameter))
    if is_sharded(parameter):
        shape[cut_dimension(parameter)] *= engine.layout.tensor_size
    if name in VOCABULARY:
        shape[0] = engine.config.model.vocab_size
    return TensorSpec(tuple(shape), torch.float32)


def cut_dimension(parameter: Any) -> int:
    """The dimension along which megatron-core's layers cut a parameter."""
    return parameter.partition_dim


def is_sharded(parameter: Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def all_specs(engine: Engine) -> list[dict[str, TensorSpec]]:
    """Name -> shape of every parameter, by pipeline stage."""
    own = {name: full_spec(engine, name, p) for name, p in engine.named_parameters()}
    stages: list[dict[str, TensorSpec]] = [{}] * engine.layout.pipeline_size
    dist.all_gather_object(stages, own, group=engine.layout.pipeline_group)
    return stages


def whole(engine: Engine, name: str, parameter: Parameter, shard: Tensor) -> Tensor:
    """The tensor that the tensor-parallel ranks hold together, without padded vocabulary rows."""
    if is_sharded(parameter) and engine.layout.tensor_size > 1:
        shards = [torch.empty_like(shard) for _ in range(engine.layout.tensor_size)]
        dist.all_gather(shards, shard.contiguous(), group=engine.layout.tensor_group)
        shard = torch.cat(shards, dim=cut_dimension(parameter))
    return shard[: engine.config.model.vocab_size] if name in VOCABULARY else shard


def own_slice(engine: Engine, parameter: Parameter, stored: Any) -> Tensor:
    """This rank's part of a stored tensor; padded vocabulary rows are zeros."""
    shape = local_shape(parameter)
    if not is_sharded(parameter):
        value = stored[:]
    else:
        size = shape[cut_dimension(parameter)]
        start = size * engine.layout.tensor_rank
        length = stored.get_shape()[cut_dimension(parameter)]
        part = slice(min(start, length), min(start + size, length))
        value = stored[part] if cut_dimension(parameter) == 0 else stored[:, part]
    if value.shape != shape:
        padded = value.new_zeros(shape)
        padded[: len(value)] = value
        value = padded
    return value


def raise_on_all_ranks(
    work: Callable[[], Any],
    in_words: Callable[[OSError], str],
    group: dist.ProcessGroup | None = None,
) -> list[Any]:
    """Do `work` on every rank; every rank gets all results, or the first failure.

    in_words: what a failing disk means to a user. group: all ranks again, for a thread's own
    exchanges; None: the default group.

    Raises:
        ValueError: some rank's disk or input failed; no rank is left waiting for it.
    """
    result, failure = None, None
    try:
        result = work()
    except OSError as error:
        failure = in_words(error)
    except ValueError as error:
        failure = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (result, failure), group=group)
    for _, message in everyone:
        if message is not None:
            raise ValueError(message)
    return [one for one, _ in everyone]
