"""Causal self-attention with rotary positions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.init import initializer
from model.linears import ColumnLinear, RowLinear, tensor_parallel_size
from model.rotary import rotary_tables, rotate


class Past:
    """Keys and values of the tokens so far, [batch, heads, tokens, head_dim] each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


@contextmanager
def remembering(model: nn.Module) -> Iterator[None]:
    """Inside, each call goes on after the tokens of the calls before it, one token at a time."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.past = Past()
    try:
        yield
    finally:
        for layer in layers:
            layer.past = None


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim), causal) v for each head, then one output matrix.

    The rows of `query_key_value` are interleaved per head, [head][q, k, v][head_dim], so that
    sharding its rows shards heads.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, name: str, config: ModelConfig, *, seed: int, sequence_parallel: bool):
        super().__init__()
        hidden = config.hidden_size
        self.past: Past | None = None  # of a text that is being generated: see `remembering`
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads // tensor_parallel_size()
        self.query_key_value = ColumnLinear(
            hidden,
            3 * hidden,
            initializer(f"{name}.query_key_value.weight", config, seed),
            sequence_parallel=sequence_parallel,
        )
        self.dense = RowLinear(
            hidden,
            hidden,
            initializer(f"{name}.dense.weight", config, seed),
            sequence_parallel=sequence_parallel,
        )
        cos, sin = rotary_tables(
            config.max_position_embeddings, config.rotary_dims, config.rotary_base
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape."""
        qkv = self.query_key_value(x)
        sequence, batch, _ = qkv.shape
        qkv = qkv.view(sequence, batch, self.heads, 3, self.head_dim)
        start = 0 if self.past is None else self.past.length
        assert start == 0 or sequence == 1, "after the first call, one token at a time"
        positions = slice(start, start + sequence)
        qk, v = qkv.split((2, 1), dim=3)
        qk = rotate(qk, self.cos[positions], self.sin[positions])
        # [batch, heads, sequence, head_dim] each
        q, k, v = (part.permute(1, 2, 0, 3) for part in (*qk.unbind(3), v.squeeze(3)))
        if self.past is not None:
            k, v = self.past.extend(k, v)
        # A single token after others sees them all.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
        mixed = mixed.permute(2, 0, 1, 3).reshape(sequence, batch, self.heads * self.head_dim)
        return self.dense(mixed)
