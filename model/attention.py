"""Causal self-attention with rotary positions."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.init import initializer
from model.linears import ColumnLinear, RowLinear, tensor_parallel_size
from model.rotary import rotary_tables, rotate


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
        qk = rotate(qkv[:, :, :, :2], self.cos[:sequence], self.sin[:sequence])
        q, k = (part.permute(1, 2, 0, 3) for part in qk.unbind(3))  # [batch, heads, sequence, dim]
        v = qkv[:, :, :, 2].permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.permute(2, 0, 1, 3).reshape(sequence, batch, self.heads * self.head_dim)
        return self.dense(mixed)
