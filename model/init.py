"""Initial weights: each parameter drawn from its own seed, so every layout starts alike."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelConfig

# The two matrices of a block that write into the residual stream.
RESIDUAL_WRITERS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


def initial_std(name: str, config: ModelConfig) -> float:
    """Standard deviation of the named weight matrix or embedding at step 0.

    `pythia` is Nguyen & Salazar's "small" initialisation, sqrt(2 / (5 hidden)), with
    2 / (layers sqrt(hidden)) for the residual stream's writers; `normal` is 0.02 and
    0.02 / sqrt(2 layers).
    """
    layers, hidden = config.num_layers, config.hidden_size
    writes_residual = name.endswith(RESIDUAL_WRITERS)
    if config.initialization == "normal":
        return 0.02 / math.sqrt(2 * layers) if writes_residual else 0.02
    return 2 / (layers * math.sqrt(hidden)) if writes_residual else math.sqrt(2 / (5 * hidden))


def initializer(name: str, config: ModelConfig, seed: int) -> Callable[[Tensor], Tensor]:
    """Returns what fills the whole (unsharded) tensor of this canonical name with N(0, std).

    A tensor-parallel rank draws the whole tensor and keeps its slice. Embedding rows past the
    vocabulary, which only some layouts have, are zero and drawn last.
    """

    def fill(weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(_seed_of(name, seed))
        rows = config.vocab_size if "embed_" in name else weight.shape[0]
        weight[rows:].zero_()
        weight[:rows].normal_(std=initial_std(name, config), generator=generator)
        return weight

    return fill


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # a generator takes 63 bits
