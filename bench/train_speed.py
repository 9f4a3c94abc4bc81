"""Training speed on this machine: our model against its peers, and L2E on against off.

One process, one Pythia shape; whole steps (forward, backward, update), taking turns so that drift
hits all alike. A peer that cannot run here is named with its reason.

    python bench/train_speed.py --preset 14m --dtype bf16 --rounds 15 --output speed.json
    python bench/train_speed.py --eager --rounds 1 --pairs 100
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.contenders import (
    DTYPES,
    TRITON_VARIANTS,
    VARIANTS,
    Step,
    Workload,
    compiling,
    megatron_step,
    one_process,
    our_steps,
    transformers_step,
)
from bench.machine import default_device, describe_machine
from bench.timing import added, estimate, interleave
from l2e.problems import first_line
from launch.engine.hardware import keep_freed_memory, measured_peak
from launch.planning.cost import flops_per_token
from model.config import ModelConfig

PAIR = ("ours", "ours + l2e mid2")


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = Workload(
        config=ModelConfig.model_validate({"preset": arguments.preset}),
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        dtype=arguments.dtype,
        device=default_device(),
    )
    with one_process(work.device):
        result = measure(work, arguments.rounds, arguments.pairs, arguments.eager)
    result = {"machine": describe_machine(work.device)} | result
    print_table(result)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="14m", help="Pythia size")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of weights and activations"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="sequences a step")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--pairs", type=int, default=0, help="timed steps of ours and mid2 alone")
    parser.add_argument("--eager", action="store_true", help="compile none (which takes minutes)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


def measure(work: Workload, rounds: int, pairs: int = 0, eager: bool = False) -> dict:
    """Seconds a step of every contender that runs here, and what the goals speak of.

    `pairs`: of rounds of ours with and without L2E alone, so many that its addition stands out.
    """
    if work.device.type == "cpu":
        keep_freed_memory()  # as the trainer does, and so for all
    steps, absent = contenders(work, eager)
    taken = interleave(steps, rounds, warmup=2)
    pair = {name: steps[name] for name in PAIR}
    alone = interleave(pair, pairs, warmup=0)
    steps.clear()
    pair.clear()
    gc.collect()
    return {
        "preset": work.config.preset,
        "dtype": work.dtype,
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        "rounds": rounds,
        "absent": absent,
    } | summary(taken, alone, work)


def contenders(work: Workload, eager: bool = False) -> tuple[dict[str, Step], dict[str, str]]:
    """Every step that runs on this machine, and why the others don't."""
    gpu = work.device.type == "cuda"
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}

    def attempt(name: str, build: Callable[[], dict[str, Step]]) -> None:
        try:
            built = build()
            for step in built.values():
                step()
        except Exception as error:  # a peer that fails must not end the bench
            absent[name] = f"{type(error).__name__}: {first_line(error)}"
        else:
            steps.update(built)

    attempt("transformers", lambda: {"transformers": transformers_step(work)})
    attempt("megatron-core", lambda: {"megatron-core": megatron_step(work)})
    attempt("ours", lambda: our_steps(work, VARIANTS | (TRITON_VARIANTS if gpu else {})))
    if eager:
        return steps, absent
    compiled = {name: VARIANTS[name] for name in PAIR}
    with compiling():
        attempt(
            "transformers, compiled",
            lambda: {"transformers, compiled": transformers_step(work, compiled=True)},
        )
        attempt(
            "ours, compiled",
            lambda: {
                f"{name}, compiled": step
                for name, step in our_steps(work, compiled, compiled=True).items()
            },
        )
    return steps, absent


def summary(taken: dict[str, list[float]], alone: dict[str, list[float]], work: Workload) -> dict:
    """Seconds a step, tokens/s, share of the peak, and the ratios that the goals speak of.

    `alone` holds further rounds of `PAIR`, or none.
    """
    seconds = {name: estimate(values).as_dict() for name, values in taken.items()}
    size = 8192 if work.device.type == "cuda" else 1024
    peak = measured_peak(work.device, DTYPES[work.dtype], size)
    flops = flops_per_token(work.config, work.sequence_length) * work.tokens
    peers = {name: value["median"] for name, value in seconds.items() if "ours" not in name}
    fastest = min(peers, key=peers.__getitem__)
    own = min(("ours", "ours, compiled"), key=lambda n: seconds.get(n, {"median": 1e9})["median"])

    def over(peer: str, ours: str) -> dict[str, float]:
        return estimate([a / b for a, b in zip(taken[peer], taken[ours], strict=True)]).as_dict()

    pairs = len(alone[PAIR[0]])
    return {
        "seconds_a_step": seconds,
        "tokens_per_second": {n: work.tokens / value["median"] for n, value in seconds.items()},
        "measured_peak_tflops": peak / 1e12,
        "share_of_peak": {n: flops / value["median"] / peak for n, value in seconds.items()},
        "fastest_peer": fastest,
        "fastest_of_ours": own,
        "ours_over_fastest_peer": over(fastest, own),
        "speed_over_peers": {
            ours: {peer: over(peer, ours) for peer in peers}
            for ours in ("ours", "ours, compiled")
            if ours in taken
        },
        "added_percent": {
            name: added(taken, name, "ours, compiled" if "compiled" in name else "ours").as_dict()
            for name in taken
            if "ours +" in name
        },
        "pairs": {
            "rounds": pairs,
            "added_percent": added(alone, PAIR[1], PAIR[0]).as_dict() if pairs else None,
        },
    }


def print_table(result: dict) -> None:
    """The result for a terminal."""
    print(f"{result['machine']['name']}: {result['preset']}, {result['dtype']}")
    for name, rate in result["tokens_per_second"].items():
        seconds = result["seconds_a_step"][name]["median"]
        share = result["share_of_peak"][name]
        print(f"  {name:28} {seconds:8.3f} s a step {rate:10,.0f} tokens/s {share:6.1%} of peak")
    for name, reason in result["absent"].items():
        print(f"  {name:28} not measured: {reason}")
    for ours, peers in result["speed_over_peers"].items():
        for peer, value in peers.items():
            print(f"  {ours} over {peer}: {interval(value, ' x')}")
    for name, value in result["added_percent"].items():
        print(f"  {name} adds {interval(value, ' %')}")
    if result["pairs"]["rounds"]:
        print(f"  {PAIR[1]} adds {interval(result['pairs']['added_percent'], ' %')} in pairs alone")


def interval(value: dict[str, float], unit: str) -> str:
    """A median and its 95 % interval."""
    return f"{value['median']:.2f}{unit} ({value['low']:.2f} .. {value['high']:.2f})"


if __name__ == "__main__":
    main()
