"""What `l2e.attach` adds to a training step of somebody else's model.

OMP_NUM_THREADS=1 python bench/attach_speed.py --rounds 60

Linear 256 -> 4096, GELU, Linear 4096 -> 256 on 2,048 rows, inhibited behind the GELU; a step is
forward, backward, SGD's update and the handle's step. Written to bench/results/attach/ and
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

import l2e
from bench.machine import default_device, describe_machine, kind
from bench.report import write_report
from bench.timing import added, estimate, interleave

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
WIDTH, NEURONS, ROWS = 256, 4096, 2048
CONFIGS = {
    "none (observing)": l2e.L2EConfig(layers="all", method="none"),
    "regularize": l2e.L2EConfig(layers="all"),
    "deactivate": l2e.L2EConfig(layers="all", method="deactivate"),
}
STEPS = 30  # before the clock starts: the threshold has settled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each contender")
    parser.add_argument("--note", default="", help="what readers should know about the machine")
    arguments, device = parser.parse_args(), default_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    machine = describe_machine(device) | {"note": arguments.note}
    found = {"machine": machine, "rounds": arguments.rounds} | measure(arguments.rounds, device)
    file = RESULTS / "attach" / f"{kind(device)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")
    write_report(RESULTS, ROOT / "docs" / "benchmarks.md")
    print(json.dumps(found, indent=2))


def measure(rounds: int, device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds a step of each contender, and by how many percent it takes longer."""
    calls = {"plain": training(None, device)}
    calls |= {name: training(config, device) for name, config in CONFIGS.items()}
    taken = interleave(calls, rounds)
    return {
        "milliseconds": {
            name: estimate([1e3 * s for s in seconds]).as_dict() for name, seconds in taken.items()
        },
        "added": {name: added(taken, name, "plain").as_dict() for name in CONFIGS},
    }


def training(config: l2e.L2EConfig | None, device: torch.device) -> Callable[[], object]:
    """A training step, with late start behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.GELU(), nn.Linear(NEURONS, WIDTH))
    model.to(device).train()
    x = torch.randn(ROWS, WIDTH, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = None
    if config is not None:
        handle = l2e.attach(model, "1", config)
        handle.controller.phase.step = handle.controller.phase.start - 2

    def step() -> None:
        loss = model(x).square().mean()
        if handle is not None:
            loss = loss + handle.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            handle.step()

    for _ in range(STEPS if handle else 0):
        step()
    return step


if __name__ == "__main__":
    main()
