"""MEmeL on ConvGRU: frames of drifting blobs to be forecast, in all six recurrent modules.

python docs/how_to/memel_convgru.py

An encoder of three cells sees some frames, a forecaster of three cells gives the next ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import memel
import torch
from torch import Tensor, nn

import l2e

SIZE, SEEN, FORECAST, BATCH = 16, 5, 5, 16
SEQUENCES, VALIDATION, BLOBS = 512, 256, 3
CHANNELS = 16


def main() -> None:
    arguments = memel.parser(__doc__, steps=200).parse_args()
    frames, unseen = drifting(SEQUENCES, seed=0), drifting(VALIDATION, seed=1)

    def train(config: l2e.L2EConfig, seed: int) -> memel.Scores:
        torch.manual_seed(seed)
        model = Forecaster()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        handle = l2e.attach(model, "cells.?", config, neuron_dim=1)  # [batch, channels, ...]
        model.train()
        for numbers in memel.orders(SEQUENCES, BATCH, arguments.steps, seed):
            batch = frames[numbers]
            loss = nn.functional.mse_loss(model(batch[:, :SEEN]), batch[:, SEEN:])
            (loss + handle.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.step()
        with torch.no_grad():
            error = model.eval()(unseen[:, :SEEN]) - unseen[:, SEEN:]
        return {
            "100 x MSE": 100 * error.square().mean().item(),
            "100 x MAE": 100 * error.abs().mean().item(),
        }

    memel.compare(train, list(range(6)), arguments)


class Cell(nn.Module):
    """A gated recurrent unit over images [batch, channels, height, width]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(inputs + CHANNELS, 2 * CHANNELS, 3, padding=1)
        self.candidate = nn.Conv2d(inputs + CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        update, reset = torch.sigmoid(self.gates(torch.cat([x, hidden], 1))).chunk(2, 1)
        new = torch.tanh(self.candidate(torch.cat([x, reset * hidden], 1)))
        return (1 - update) * hidden + update * new


class Forecaster(nn.Module):
    """Three cells on one another read; three, which start from their states, write."""

    def __init__(self) -> None:
        super().__init__()
        inputs = [1, CHANNELS, CHANNELS, 1, CHANNELS, CHANNELS]
        self.cells = nn.ModuleList(Cell(channels) for channels in inputs)
        self.head = nn.Conv2d(CHANNELS, 1, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """[batch, SEEN, SIZE, SIZE] -> [batch, FORECAST, SIZE, SIZE]."""
        states = [frames.new_zeros(len(frames), CHANNELS, SIZE, SIZE)] * 3
        for frame in frames.unbind(1):
            _, states = self.layers(self.cells[:3], frame[:, None], states)
        written, last = [], frames[:, -1:]
        for _ in range(FORECAST):
            out, states = self.layers(self.cells[3:], last, states)
            last = last + self.head(out)
            written.append(last)
        return torch.cat(written, 1)

    @staticmethod
    def layers(cells, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        new = []
        for cell, state in zip(cells, states, strict=True):
            x = cell(x, state)
            new.append(x)
        return x, new


def drifting(count: int, seed: int) -> Tensor:
    """Frames [count, SEEN + FORECAST, SIZE, SIZE] of blobs that move on a torus."""
    generator = torch.Generator().manual_seed(seed)
    start = SIZE * torch.rand(count, BLOBS, 1, 2, generator=generator)
    speed = torch.randn(count, BLOBS, 1, 2, generator=generator)
    place = start + speed * torch.arange(SEEN + FORECAST)[:, None]  # [count, BLOBS, frames, 2]
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"), -1)
    apart = (grid - place[..., None, None, :]).abs() % SIZE
    distance = torch.minimum(apart, SIZE - apart).square().sum(-1)
    return torch.exp(-distance / 4).sum(1)


if __name__ == "__main__":
    main()
