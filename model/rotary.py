"""Rotary positions (Su et al. 2021) on the first channels of each head, GPT-NeoX's half-rotation.

Channel i and channel i + dims/2 form a pair, turned at position t by the angle
t * base^(-2i/dims).
"""

import torch
from torch import Tensor


def rotary_tables(positions: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, float32, each [positions, dims / 2]."""
    frequencies = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first `dims` channels of x; the rest pass through.

    x: [sequence, ..., channels]; cos, sin: [sequence, dims / 2].
    """
    half = cos.shape[-1]
    per_position = (x.shape[0],) + (1,) * (x.dim() - 2) + (half,)
    cos, sin = (table.to(x.dtype).view(per_position) for table in (cos, sin))
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
