"""Gradients that all tensor-parallel ranks hold alike: a bad one is seen, whichever rank has it.

A gradient's norm counts what the ranks hold alike once, on the first of them. Arithmetic gives all
the same numbers, a broken processor may not, and its rank alone would update to weights that are
none. So the other ranks add zero times such gradients to one that only they have, and that counts:
nothing while they are finite, and no number if they are not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from launch.engine.layout import Layout

# Their gradients come after those of a block's norms and biases, and the embedding's after all.
WITNESSES = ("attention.query_key_value.weight", "embed_in.weight")


def watch_copies(parameters: Mapping[str, Parameter], layout: Layout) -> None:
    """From now on, let gradients of this rank's own carry the news of those held alike.

    A pipeline's later stages have no embedding: there the first block's input LayerNorm is heard
    of with the next micro-batch.
    """
    if layout.tensor_rank == 0:
        return
    waiting: list[Tensor] = []

    def witness(gradient: Tensor) -> None:
        if waiting:
            together = torch.cat([one.reshape(-1) for one in waiting])
            gradient[0, 0] += 0 * together.sum(dtype=torch.float32)
            waiting.clear()

    for name, parameter in parameters.items():
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.register_hook(waiting.append)
        elif name.endswith(WITNESSES):
            parameter.register_hook(witness)
