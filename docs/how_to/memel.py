"""MEmeL's arms with its own settings, in anybody's training loop, and what they change.

Runs of one seed start alike and see the same data in the same order, so that they pair: what is
said of an arm is the mean over seeds of its difference to `none`, with a 95 % t-interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from l2e import L2EConfig
from launch.comparison.statistics import over_seeds

Scores = dict[str, float]
# MEmeL, section 4: forgetting and inhibition begin after 10 batches; the k largest of each sample.
SETTINGS = {"selection": "topk", "eps": 0.01, "forget_step": 10, "late_start_step": 10}


def arms(layers: list[int], topk: int = 1, delta: float = 1.0) -> dict[str, L2EConfig]:
    """The paper's arms in modules of these numbers. It tunes k and delta over 1, 5, 10, 50, 100."""

    def deactivate(delta: float) -> L2EConfig:
        return L2EConfig(method="deactivate", delta=delta, topk=topk, layers=layers, **SETTINGS)

    return {
        "none": L2EConfig(method="none", topk=topk, layers=layers, **SETTINGS),
        "naive (a)": deactivate(0.0),
        "naive (b)": deactivate(-1.0),
        "MEmeL": deactivate(delta),
    }


def parser(description: str | None, steps: int) -> argparse.ArgumentParser:
    """The command line that all programs share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of a run")
    parser.add_argument("--topk", type=int, default=1, help="activations inhibited in a sample")
    parser.add_argument("--delta", type=float, default=1.0, help="strength of MEmeL's arm")
    parser.add_argument("--json", type=Path, help="a file for every run's scores")
    return parser


def compare(train: Callable[[L2EConfig, int], Scores], layers: list[int], arguments) -> None:
    """Train every arm with every seed; print the table, and write the scores where asked."""
    found: dict[str, list[Scores]] = {}
    for name, config in arms(layers, arguments.topk, arguments.delta).items():
        for seed in range(arguments.seeds):
            found.setdefault(name, []).append(train(config, seed))
            print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def table(found: dict[str, list[Scores]]) -> str:
    """Markdown: of each arm and score the mean over seeds, and the difference to `none`."""
    scores = list(found["none"][0])
    titles = ["arm", *(title for score in scores for title in (score, "minus none [95 %]"))]
    lines = [titles, ["---"] * len(titles)]
    for name, runs in found.items():
        cells = [name]
        for score in scores:
            values = [run[score] for run in runs]
            paired = [a - b[score] for a, b in zip(values, found["none"], strict=True)]
            cells.append(f"{sum(values) / len(values):.4f}")
            cells.append("" if name == "none" else str(over_seeds(paired)))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def orders(samples: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Of each step the numbers of its samples, every sample once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(numbers) < batch:
            numbers = torch.cat([numbers, torch.randperm(samples, generator=generator)])
        yield numbers[:batch]
        numbers = numbers[batch:]
