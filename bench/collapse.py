"""Does L2E lighten the tails of a layer, or shrink the layer away? Arms side by side.

A small GPT-NeoX learns real text, byte by byte, with its two middle MLPs inhibited in different
ways from the same weights and the same batches. For each arm: held-out loss, and of the inhibited
layers the activations' standard deviation, median kurtosis, and the RMS of the MLP's output over
the residual stream's; and the standard deviation before the non-linearity.

    python bench/collapse.py --corpus corpus/train.jsonl.zst --steps 600 --output collapse.json
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import zstandard
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import l2e

ARMS: dict[str, dict[str, Any]] = {
    "weight 0": {"weight": 0.0},
    "plain": {},
    "scale invariant": {"scale_invariant": True},
    "scale invariant, forget 5": {"scale_invariant": True, "forget_step": 5},
    "live variance": {"weight": 0.0},
    "live variance, linear": {"weight": 0.0},
    "silence": {"method": "silence"},
}


@dataclass(frozen=True)
class Trial:
    """The model's and the run's size, and the weight of L_MS in the arms that have one."""

    weight: float = 0.01
    steps: int = 600
    layers: int = 6
    hidden: int = 64
    length: int = 128
    batch: int = 8
    late_start: int = 50
    learning_rate: float = 2e-3
    seed: int = 0


def read_bytes(corpus: Path, limit: int = 4_000_000) -> Tensor:
    """The texts' first `limit` bytes, int64."""
    text = bytearray()
    with corpus.open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8")
        for line in lines:
            text += json.loads(line)["text"].encode() + b"\0"
            if len(text) >= limit:
                break
    return torch.frombuffer(text[:limit], dtype=torch.uint8).long()


def build(trial: Trial, arm: str) -> GPTNeoXForCausalLM:
    """The same initial weights for every arm; a silenced MLP's output weights are 0."""
    torch.manual_seed(trial.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=trial.hidden,
            num_hidden_layers=trial.layers,
            num_attention_heads=4,
            intermediate_size=4 * trial.hidden,
            max_position_embeddings=trial.length,
            vocab_size=256,
        )
    )
    for number in l2e.select_layers("mid2", trial.layers):
        mlp: Any = model.gpt_neox.layers[number].mlp
        if arm == "silence":
            nn.init.zeros_(mlp.dense_4h_to_h.weight)
        if "linear" in arm:
            mlp.act = nn.Identity()
    return model


@dataclass
class BlockReadings:
    """What one inhibited block's MLP shows in the newest forward pass."""

    z: Tensor = field(default_factory=lambda: torch.zeros(0))
    before: Tensor = field(default_factory=lambda: torch.zeros(0))
    ratio: float = 0.0

    def observe(self, block: Any) -> None:
        """Look into a block: pre-activations, activations, MLP output over residual stream."""
        residual: list[Tensor] = []
        block.register_forward_pre_hook(lambda _, args: residual.append(args[0].detach()))
        block.mlp.dense_h_to_4h.register_forward_hook(
            lambda _, __, out: setattr(self, "before", out.detach().flatten(0, 1))
        )
        block.mlp.act.register_forward_hook(
            lambda _, __, out: setattr(self, "z", out.flatten(0, 1))
        )
        block.mlp.register_forward_hook(
            lambda _, __, out: setattr(self, "ratio", rms(out) / rms(residual.pop()))
        )


def rms(values: Tensor) -> float:
    return float(values.detach().square().mean().sqrt())


def live_variance_loss(z: Tensor, fraction: float = 0.02) -> Tensor:
    """Mean over the batch's largest scales of log((z - mean)^2 / var), gradient through both."""
    square = (z - z.mean(0)).square()
    scale = square / square.mean(0)
    largest = scale.flatten().topk(int(fraction * scale.numel())).values
    return largest.log().mean()


def run(arm: str, data: Tensor, trial: Trial, progress: bool = True) -> dict[str, float]:
    """Train one arm and return its metrics."""
    model = build(trial, arm).train()
    blocks = [model.gpt_neox.layers[n] for n in l2e.select_layers("mid2", trial.layers)]
    readings = [BlockReadings() for _ in blocks]
    for reading, block in zip(readings, blocks, strict=True):
        reading.observe(block)
    keys = {"weight": trial.weight, "late_start_step": trial.late_start, **ARMS[arm]}
    handle = l2e.attach(model, "gpt_neox.layers.*.mlp.act", l2e.L2EConfig(**keys))
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.learning_rate, betas=(0.9, 0.95))
    held_out = len(data) * 9 // 10
    generator = torch.Generator().manual_seed(trial.seed)
    for step in tqdm(range(trial.steps), desc=arm, disable=not progress):
        handle.controller.measure = step == trial.steps - 1
        batch = sample(data[:held_out], trial, generator)
        loss = model(batch, labels=batch).loss + handle.loss()
        if "live" in arm and step >= trial.late_start:
            loss = loss + trial.weight * sum(live_variance_loss(w.z) for w in readings) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        handle.step()
    metrics = list(handle.metrics().values())
    return {
        "validation_loss": validate(model, data[held_out:], trial),
        "std": mean(layer["std"] for layer in metrics),
        "kurtosis": mean(layer["kurtosis"] for layer in metrics),
        "mlp_to_residual": mean(reading.ratio for reading in readings),
        "std_before_activation": mean(float(w.before.std(0).mean()) for w in readings),
    }


def sample(data: Tensor, trial: Trial, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - trial.length, (trial.batch,), generator=generator)
    return torch.stack([data[start : start + trial.length] for start in starts])


@torch.no_grad()
def validate(model: nn.Module, data: Tensor, trial: Trial) -> float:
    """Nats a byte on the same held-out windows for every arm."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    batches = [sample(data, trial, generator) for _ in range(16)]
    return mean(float(model(batch, labels=batch).loss) for batch in batches)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def tail_by_scale(activation: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """The live-variance loss of `activation` of Gaussian pre-activations of each scale."""
    pre = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    scales = (0.1, 0.3, 1.0, 3.0)
    return {str(scale): float(live_variance_loss(activation(scale * pre))) for scale in scales}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines, zstandard")
    parser.add_argument("--steps", type=int, default=Trial.steps)
    parser.add_argument("--weight", type=float, default=Trial.weight, help="of L_MS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--output", type=Path, help="write the metrics as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = read_bytes(options.corpus)
    rows = []
    print(f"{'arm':26} seed  valid. loss      std  kurtosis  MLP/residual  std before activation")
    for seed in options.seeds:
        trial = Trial(weight=options.weight, steps=options.steps, seed=seed)
        for arm in options.arms:
            row = run(arm, data, trial, progress=sys.stderr.isatty())
            rows.append({"arm": arm, "seed": seed} | row)
            print(
                f"{arm:26} {seed:4} {row['validation_loss']:12.4f} {row['std']:8.4f} "
                f"{row['kurtosis']:9.2f} {row['mlp_to_residual']:13.4f} "
                f"{row['std_before_activation']:22.4f}",
                flush=True,
            )
    tails = {"gelu": tail_by_scale(nn.functional.gelu), "linear": tail_by_scale(lambda x: x)}
    for name, by_scale in tails.items():
        print(f"live-variance loss of {name} by the scale of Gaussian pre-activations: {by_scale}")
    if options.output:
        result = {
            "command": " ".join(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.processor() or platform.machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": rows,
            "tails": tails,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
