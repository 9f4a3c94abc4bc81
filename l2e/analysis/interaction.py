"""Sampled neuron interaction networks (NeuroMFA, Section 3.1): which weights, and node distances.

A network is a list of weight matrices [sources, targets], four a block: block input to q, k and v
channels; attention channels to attention output; attention output to MLP hidden; MLP hidden to the
next block's input. Embeddings, norms and biases are left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l2e.analysis.multifractal import kept_counts
from l2e.analysis.series import SeriesCheckpoint
from l2e.analysis.weights import Weights, fetch_model
from l2e.hub import parse
from l2e.problems import first_line


@dataclass(frozen=True)
class Architecture:
    """What of a Hugging Face configuration decides which weights are sampled."""

    family: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        """The attention's width, where its heads' outputs lie side by side."""
        return self.heads * self.head_dim

    @classmethod
    def of(cls, config) -> "Architecture":
        """From a transformers configuration of a GPT-NeoX, GPT-2 or Llama model."""
        if config.model_type not in MATRICES:
            known = ", ".join(MATRICES)
            raise ValueError(f"model type {config.model_type!r} is not known; known are {known}")
        hidden, heads = config.hidden_size, config.num_attention_heads
        return cls(
            config.model_type,
            config.num_hidden_layers,
            hidden,
            getattr(config, "intermediate_size", None)
            or getattr(config, "n_inner", None)
            or 4 * hidden,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or hidden // heads,
        )


@dataclass(frozen=True)
class ModelWeights:
    """One model's weights on disk; step: of the checkpoint they are, None if that isn't known."""

    name: str
    step: int | None
    weights: Weights
    architecture: Architecture


def open_weights(checkpoint: SeriesCheckpoint) -> ModelWeights:
    """The weights of a folder in Hugging Face form, or of `owner/name@revision`.

    Raises ValueError if they can't be read.
    """
    from transformers import AutoConfig

    source = checkpoint.source
    path, revision = parse(source)
    if not Path(path).is_dir():
        try:
            path = str(fetch_model(path, revision))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source}: no such folder, nor a model id: {first_line(error)}"
            ) from error
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: no readable config.json: {error}") from error
    architecture = Architecture.of(config)
    return ModelWeights(checkpoint.name, checkpoint.step, Weights(path), architecture)


class Sample(NamedTuple):
    """The sampled indices of one block: S1, S2 (= S3), S4, S5 and S6 of the paper."""

    block_input: np.ndarray
    channels: np.ndarray
    attention_output: np.ndarray
    hidden: np.ndarray
    block_output: np.ndarray


def draw_samples(architecture: Architecture, size: int, seed: int) -> list[Sample]:
    """The indices of one network, per block, without replacement, in the published order of draws.

    Raises ValueError if the model is too small for the sample.
    """
    width, inner, channels = architecture.hidden, architecture.intermediate, architecture.channels
    if size > min(width, channels) or 2 * size > inner:
        raise ValueError(
            f"sample size {size} needs {size} of {width} hidden units, {size} of {channels} "
            f"attention channels and {2 * size} of {inner} MLP neurons; use at most "
            f"{min(width, channels, inner // 2)}"
        )
    random = np.random.RandomState(seed)  # the published networks come from it

    def draw(count: int, among: int) -> np.ndarray:
        return random.choice(among, count, replace=False)

    drawn = [
        (draw(size, width), draw(size, channels), draw(size, width), draw(2 * size, inner))
        for _ in range(architecture.num_layers)
    ]
    outputs = [block[0] for block in drawn[1:]] + [draw(size, width)]
    return [Sample(*block, output) for block, output in zip(drawn, outputs, strict=True)]


def sampled_network(model: ModelWeights, samples: list[Sample], layout: str) -> list:
    """The weights of one network, float64 [sources, targets], four matrices a block in order."""
    read = MATRICES[model.architecture.family]
    return [
        matrix
        for block, sample in enumerate(samples)
        for matrix in read(model, block, sample, layout)
    ]


def _gpt_neox(model: ModelWeights, block: int, s: Sample, layout: str):
    weights, shape = model.weights, model.architecture
    at = f"layers.{block}."
    if layout == "per_head":  # rows are [head][q, k, v][head dim]
        size = shape.head_dim
        first = s.channels // size * 3 * size + s.channels % size
        qkv = np.concatenate([first, first + size, first + 2 * size])
    else:
        qkv = np.concatenate([s.channels + part * shape.channels for part in range(3)])
    yield weights.entries(at + "attention.query_key_value.weight", qkv, s.block_input).T
    yield weights.entries(at + "attention.dense.weight", s.attention_output, s.channels).T
    yield weights.entries(at + "mlp.dense_h_to_4h.weight", s.hidden, s.attention_output).T
    yield weights.entries(at + "mlp.dense_4h_to_h.weight", s.block_output, s.hidden).T


def _gpt2(model: ModelWeights, block: int, s: Sample, layout: str):
    weights, at = model.weights, f"h.{block}."  # Conv1D: [inputs, outputs], q, k, v in turn
    qkv = np.concatenate([s.channels + part * model.architecture.hidden for part in range(3)])
    yield weights.entries(at + "attn.c_attn.weight", s.block_input, qkv)
    yield weights.entries(at + "attn.c_proj.weight", s.channels, s.attention_output)
    yield weights.entries(at + "mlp.c_fc.weight", s.attention_output, s.hidden)
    yield weights.entries(at + "mlp.c_proj.weight", s.hidden, s.block_output)


def _llama(model: ModelWeights, block: int, s: Sample, layout: str):
    weights, shape = model.weights, model.architecture
    at = f"layers.{block}."
    size = shape.head_dim
    # Grouped queries: a channel's key and value are those of its head's group.
    group = s.channels // size // (shape.heads // shape.kv_heads) * size + s.channels % size
    parts = [("q_proj", s.channels), ("k_proj", group), ("v_proj", group)]
    qkv = [weights.entries(f"{at}self_attn.{n}.weight", rows, s.block_input) for n, rows in parts]
    yield np.concatenate(qkv).T
    yield weights.entries(at + "self_attn.o_proj.weight", s.attention_output, s.channels).T
    yield weights.entries(at + "mlp.gate_proj.weight", s.hidden, s.attention_output).T
    yield weights.entries(at + "mlp.down_proj.weight", s.block_output, s.hidden).T


MATRICES = {"gpt_neox": _gpt_neox, "gpt2": _gpt2, "llama": _llama}


def node_counts(matrices: list[np.ndarray], threshold: int, hops: int = 1) -> np.ndarray:
    """How many nodes each node reaches at each rounded distance, [nodes, threshold + 1].

    An edge's distance is 1/|w|; a path's is the sum of its edges', and at most `hops` of them.
    """
    with np.errstate(divide="ignore"):
        distances = [1.0 / np.abs(matrix) for matrix in matrices]
    counts = []
    for first, reached in enumerate(distances):
        found = kept_counts(reached, threshold)
        for edges in distances[first + 1 : first + hops]:
            if reached.shape[1] == 3 * edges.shape[0]:  # q, k and v lead on to the same channel
                reached = reached.reshape(len(reached), 3, -1).min(axis=1)
            reached = np.min(reached[:, :, None] + edges[None, :, :], axis=1)
            found += kept_counts(reached, threshold)
        counts.append(found)
    return np.concatenate(counts)
