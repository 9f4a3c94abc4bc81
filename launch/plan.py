"""Plan a run before paying for it: memory by part, step time, GPU-hours, and the best layout.

    python launch/plan.py --config configs/410m.json --gpus 8 --gpu h200

Everything printed is computed from shapes and datasheets in a second; no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of launch/

from launch.cli import run_verb
from launch.planning import cost, layouts
from launch.planning.cost import Layout
from launch.planning.layouts import GPU, GPUS, Estimate

if TYPE_CHECKING:
    from configs import Config

SHOWN_ALTERNATIVES = 8


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and print the plan."""
    options = parser().parse_args(arguments)
    import configs  # brings torch, for which --help should not wait

    config = configs.load(options.config, options.set, processes=options.gpus)
    gpu = GPUS[options.gpu]
    wanted = layouts.layout_of(config, options.gpus)
    ranked = layouts.rank_layouts(config.model, wanted, options.gpus, gpu, options.efficiency)
    configured = layouts.estimate(config.model, wanted, gpu, options.efficiency)
    print(heading(config, wanted, gpu, options))
    if configured == ranked[0] and configured.fits:
        print(describe("Chosen, as configured", configured, gpu, config.train.steps))
        print(reasons(ranked))
        return
    print(describe("As configured", configured, gpu, config.train.steps))
    if ranked[0].fits:
        print(describe("Chosen", ranked[0], gpu, config.train.steps))
        print(reasons(ranked))
    else:
        print(nothing_fits(ranked[0], gpu))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--config", required=True, help="configuration file of the run")
    result.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one key"
    )
    result.add_argument("--gpus", type=int, default=1, help="GPUs of the run (default: 1)")
    result.add_argument("--gpu", choices=GPUS, default="h200", help="their kind (default: h200)")
    result.add_argument(
        "--efficiency",
        type=float,
        default=layouts.EFFICIENCY,
        help="share of the datasheet's FLOP/s that a step's arithmetic reaches, as measured by "
        "the MFU of a run of yours (default: %(default)s)",
    )
    return result


def heading(config: Config, wanted: Layout, gpu: GPU, options: argparse.Namespace) -> str:
    """What is planned, and for which machine."""
    flops = cost.flops_per_token(config.model, wanted.sequence_length)
    tokens = config.train.steps * wanted.step_tokens
    return (
        f"{options.config} on {options.gpus} x {gpu.name} "
        f"({gpu.flops / 1e12:.0f} TFLOP/s, {gpu.memory_bandwidth / 1e12:.1f} TB/s)\n"
        f"model: {cost.parameters(config.model):,} parameters, {flops / 1e9:.3f} GFLOP a token "
        f"= 6 x matmul parameters + 12 x layers x hidden x length\n"
        f"run: {config.train.steps:,} steps of {config.train.global_batch_size:,} x "
        f"{wanted.sequence_length:,} tokens = {tokens / 1e9:.2f} billion tokens, {wanted.dtype}\n"
        f"assumed: arithmetic at {options.efficiency:.0%} of the peak, nothing overlapped"
    )


def describe(title: str, chosen: Estimate, gpu: GPU, steps: int) -> str:
    """One layout's memory by part, its step time by part, and what the run costs."""
    days = steps * chosen.step_seconds / 86400
    memory = "\n".join(
        f"    {part:<12}{size / 1e9:>9.2f} GB" for part, size in chosen.memory.items()
    )
    verdict = "fits" if chosen.fits else "DOES NOT FIT"
    spent = ", ".join(
        f"{part} {seconds:.3g}" for part, seconds in chosen.seconds.items() if seconds > 0
    )
    return (
        f"\n{title}: {name(chosen.layout)}\n"
        f"  memory a GPU, of the fullest stage\n{memory}\n"
        f"    {'total':<12}{chosen.total_memory / 1e9:>9.2f} GB of {gpu.memory / 1e9:.0f}, "
        f"{layouts.USABLE_MEMORY:.0%} of it usable: {verdict}\n"
        f"  step {chosen.step_seconds:.3g} s ({spent})\n"
        f"  {chosen.tokens_per_second:,.0f} tokens/s, {days:.2f} days, "
        f"{days * 24 * chosen.layout.ranks:,.1f} GPU-hours"
    )


def name(layout: Layout) -> str:
    """A layout in one line."""
    extras = ", sequence parallel" if layout.sequence else ""
    extras += ", activation checkpointing" if layout.checkpointing else ""
    return (
        f"{layout.tensor} tensor x {layout.pipeline} pipeline x {layout.data} data parallel, "
        f"ZeRO-{layout.zero_stage}, {layout.accumulation} micro-batches of "
        f"{layout.micro_batch_size}{extras}"
    )


def reasons(ranked: list[Estimate]) -> str:
    """Why the first of `ranked` was chosen: the best of every other split of the GPUs."""
    chosen = ranked[0]
    best: dict[tuple[int, int], Estimate] = {}
    for candidate in ranked:
        best.setdefault((candidate.layout.tensor, candidate.layout.pipeline), candidate)
    fitting = sum(candidate.fits for candidate in ranked)
    lines = [
        f"\nWhy: the simplest within 1 % of the fastest of {fitting} layouts that fit "
        f"({len(ranked)} possible)."
    ]
    others = list(best.values())[1 : 1 + SHOWN_ALTERNATIVES]
    if others:
        lines.append("The best layouts that split the GPUs otherwise:")
    for candidate in others:
        if candidate.fits:
            slower = candidate.step_seconds / chosen.step_seconds - 1
            lines.append(f"  {slower:+7.1%} time  {name(candidate.layout)}")
        else:
            size = candidate.total_memory / 1e9
            lines.append(f"  {size:5.0f} GB     {name(candidate.layout)}: too large")
    return "\n".join(lines)


def nothing_fits(smallest: Estimate, gpu: GPU) -> str:
    """What to do when no layout fits."""
    return (
        f"\nNothing fits: the smallest layout takes {smallest.total_memory / 1e9:.0f} GB a GPU of "
        f"{layouts.USABLE_MEMORY * gpu.memory / 1e9:.0f} usable ({name(smallest.layout)}). "
        "Use more GPUs or a larger kind."
    )


if __name__ == "__main__":
    run_verb(main)
