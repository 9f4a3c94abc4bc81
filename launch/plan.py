"""Plan a run before paying for it: memory by part, step time, GPU-hours, and the best layout.

    python launch/plan.py --config configs/410m.json --gpus 8 --gpu h200
    python launch/plan.py --config configs/2.8b.json --gpus 64 --gpu a100 --output plan.json
    python launch/plan.py job --scheduler slurm --config configs/410m.json --nodes 4

Everything printed is computed from shapes and datasheets in a second; no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository in place of launch/

from launch import cli
from launch.planning import cost, jobs, layouts
from launch.planning.cost import LayoutPlan
from launch.planning.layouts import Estimate
from launch.planning.speed import GPU, GPUS, UNCERTAINTY

if TYPE_CHECKING:
    from configs import Config

SHOWN_ALTERNATIVES = 8


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and print the plan, or a job file."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["job"]:
        return jobs.main(words[1:])
    options = parser().parse_args(arguments)
    import configs  # brings torch, for which --help should not wait

    config = configs.load(options.config, options.set, processes=options.gpus, dealt=False)
    gpu, share = GPUS[options.gpu], options.efficiency
    configured, obstacle = None, ""
    try:
        wanted = layouts.layout_of(config, options.gpus)
        configured = layouts.estimate(config.model, wanted, gpu, share)
    except ValueError as reason:
        wanted, obstacle = layouts.whole_batch(config), str(reason)
    ranked = layouts.rank_layouts(config.model, wanted, options.gpus, gpu, share)
    chosen = ranked[0]
    print(heading(config, wanted if configured else chosen.layout, gpu, options))
    if configured == chosen and chosen.fits:
        print(describe("Chosen, as configured", chosen, gpu, config.train.steps))
    elif configured is None:
        print(f"\nNot as configured: {obstacle}")
    else:
        print(describe("As configured", configured, gpu, config.train.steps))
    if chosen.fits and configured != chosen:
        print(describe("Chosen", chosen, gpu, config.train.steps))
        print(f"  by {settings(config, chosen.layout)}")
    if chosen.fits:
        print(reasons(ranked))
        without = replace(chosen.layout, inhibited_layers=0)
        print(l2e_cost(chosen, layouts.estimate(config.model, without, gpu, share)))
    else:
        print(nothing_fits(chosen, gpu))
    print(largest(options.gpus, gpu, wanted))
    if options.output is not None:
        asked = numbers(configured) if configured else None
        plan = {"configured": asked, "chosen": numbers(chosen)}
        options.output.write_text(json.dumps(plan, indent=1) + "\n")
        print(f"\nwrote {options.output}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = cli.verb_parser(__doc__)
    cli.add_configuration(result)
    result.add_argument(
        "--gpus", type=cli.whole(1, 1_000_000), default=1, help="GPUs of the run (default: 1)"
    )
    result.add_argument("--gpu", choices=GPUS, default="h200", help="their kind (default: h200)")
    result.add_argument(
        "--efficiency",
        type=cli.number(0, 1, above=True),
        help="share of the datasheet's FLOP/s that large matrix products keep up in training "
        "(default: the GPU's own, 0.55 to 0.70; raise or lower it until a run of yours fits)",
    )
    result.add_argument(
        "--output", type=cli.path, metavar="FILE.json", help="write the numbers too"
    )
    return result


def heading(config: Config, layout: LayoutPlan, gpu: GPU, options: argparse.Namespace) -> str:
    """What is planned, and for which machine."""
    from launch.planning.summary import summary

    return (
        f"{options.config} on {options.gpus} x {gpu.name} "
        f"({gpu.flops / 1e12:.0f} TFLOP/s, {gpu.memory_bandwidth / 1e12:.1f} TB/s)\n"
        f"{summary(config, layout)}\n"
        f"expect real times within {UNCERTAINTY:.0%} of these; ten published speeds of other "
        "stacks were met within 16 %, 7 % on average"
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


def name(layout: LayoutPlan) -> str:
    """A layout in one line."""
    extras = ", sequence parallel" if layout.sequence else ""
    extras += ", activation checkpointing" if layout.checkpointing else ""
    return (
        f"{layout.tensor} tensor x {layout.pipeline} pipeline x {layout.data} data parallel, "
        f"ZeRO-{layout.zero_stage}, {layout.accumulation} "
        f"micro-batch{'es' if layout.accumulation > 1 else ''} of {layout.micro_batch_size}{extras}"
    )


def settings(config: Config, layout: LayoutPlan) -> str:
    """What of a configuration has to be set for a layout, as words of the command line."""
    keys = {
        "parallel.tensor": (config.parallel.tensor, layout.tensor),
        "parallel.pipeline": (config.parallel.pipeline, layout.pipeline),
        "parallel.sequence": (config.parallel.sequence, layout.sequence),
        "parallel.activation_checkpointing": (
            config.parallel.activation_checkpointing,
            layout.checkpointing,
        ),
        "train.micro_batch_size": (config.train.micro_batch_size, layout.micro_batch_size),
        "deepspeed.zero_optimization.stage": (config.zero_stage, layout.zero_stage),
    }
    return " ".join(
        f"--set {key}={json.dumps(new)}" for key, (old, new) in keys.items() if new != old
    )


def reasons(ranked: list[Estimate]) -> str:
    """Why the first of `ranked` was chosen, what would change that, and the other splits."""
    chosen, quickest = ranked[0], layouts.fastest(ranked)
    best: dict[tuple[int, int], Estimate] = {}
    for candidate in ranked:
        best.setdefault((candidate.layout.tensor, candidate.layout.pipeline), candidate)
    fitting = sum(candidate.fits for candidate in ranked)
    lines = [
        f"\nWhy: the simplest within {layouts.SIMPLER_WITHIN:.0%} of the fastest of {fitting} "
        f"layouts that fit ({len(ranked)} possible)."
    ]
    if quickest != chosen:
        gained = 1 - quickest.step_seconds / chosen.step_seconds
        lines.append(
            f"What would change this: a measurement in which the fastest, {name(quickest.layout)}, "
            f"gains clearly more than the {gained:.1%} estimated here."
        )
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


def l2e_cost(chosen: Estimate, without: Estimate) -> str:
    """What the inhibited layers add to a step and to the memory."""
    layers = chosen.layout.inhibited_layers
    added = chosen.step_seconds - without.step_seconds
    size = chosen.total_memory - without.total_memory
    return (
        f"\nL2E in {layers} layers adds {1e3 * added:.2f} ms a step "
        f"({added / without.step_seconds:.2%}) and {size / 1e6:.2f} MB a GPU."
    )


def largest(gpus: int, gpu: GPU, wanted: LayoutPlan) -> str:
    """The largest model that this many GPUs hold at this batch."""
    try:
        shape, best = layouts.largest_model(gpus, gpu, wanted)
    except ValueError as error:
        return f"\n{error}"
    return (
        f"\nThe largest model of a usual form on {gpus} x {gpu.name} with this batch: "
        f"{cost.parameters(shape) / 1e9:.1f} B parameters ({shape.num_layers} layers x "
        f"{shape.hidden_size}),\n  {name(best.layout)}: {best.step_seconds:.3g} s a step"
    )


def numbers(estimate: Estimate) -> dict:
    """An estimate for programs: seconds, tokens/s of all GPUs, bytes a GPU."""
    return {
        "layout": asdict(estimate.layout),
        "step_seconds": estimate.step_seconds,
        "tokens_per_second": estimate.tokens_per_second,
        "memory_bytes": estimate.total_memory,
        "fits": estimate.fits,
        "seconds": estimate.seconds,
        "memory": estimate.memory,
        "uncertainty": UNCERTAINTY,
    }


def nothing_fits(smallest: Estimate, gpu: GPU) -> str:
    """What to do when no layout fits."""
    return (
        f"\nNothing fits: the smallest layout takes {smallest.total_memory / 1e9:.0f} GB a GPU of "
        f"{layouts.USABLE_MEMORY * gpu.memory / 1e9:.0f} usable ({name(smallest.layout)}). "
        "Use more GPUs or a larger kind."
    )


if __name__ == "__main__":
    cli.run_verb(main)
