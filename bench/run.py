"""`make bench`: every measurement in one run, as JSON and as the tables of docs/benchmarks.md.

On a GPU: Pythia 70M, 410M and 2.8B against their peers, the layer alone, loading (about 8
minutes on one H200). On a CPU: the 14M shape, the layer, loading, and 1, 2 and 4 processes.

    python bench/run.py
    python bench/run.py --only train,layer --rounds 5
    python bench/run.py --only train --dtype bf16 --rounds 5 --pairs 300
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import layer_speed, loading_speed, scaling_speed, train_speed
from bench.contenders import DTYPES, Workload, one_process
from bench.machine import default_device, describe_machine, has_bf16, kind
from bench.report import write_report
from model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# Preset, dtype, sequences a step, tokens a sequence.
WORKLOADS = {
    "cuda": [("70m", "bf16", 32, 2048), ("410m", "bf16", 16, 2048), ("2.8b", "bf16", 4, 2048)],
    "cpu": [("14m", "fp32", 2, 1024), ("14m", "bf16", 2, 1024)],
}


def main() -> None:
    arguments = parse_arguments()
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    sections: dict[str, Callable[[], object]] = {
        "train": lambda: training(device, arguments, results.get("train", [])),
        "layer": lambda: layer(device, arguments.rounds),
        "loading": loading_speed.measure,
        "scaling": lambda: scaling_speed.measure(process_counts(device), steps=14),
    }
    chosen = arguments.only.split(",") if arguments.only else list(sections)
    path = RESULTS / f"{kind(device)}.json"
    results = json.loads(path.read_text()) if arguments.only and path.exists() else {}
    note = arguments.note or results.get("machine", {}).get("note", "")
    results["machine"] = describe_machine(device) | {"note": note}
    commands = results.setdefault("commands", {})
    for name in chosen:
        begin = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            results[name] = sections[name]()
            write_down(name, arguments, commands)
        except Exception as error:  # the other sections are still worth having
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    write_report(RESULTS, ROOT / "docs" / "benchmarks.md")
    print(f"{path} and docs/benchmarks.md written")


def write_down(name: str, arguments: argparse.Namespace, commands: dict[str, str]) -> None:
    """The command that measured a section; that of one dtype stands beside that of the others."""
    options = f"--only {name} --rounds {arguments.rounds}"
    if name == "train" and arguments.pairs:
        options += f" --pairs {arguments.pairs}"
    if arguments.dtype:
        commands[f"{name} {arguments.dtype}"] = f"{options} --dtype {arguments.dtype}"
        return
    for part in [key for key in commands if key.startswith(f"{name} ")]:
        del commands[part]  # all of the section was measured anew
    commands[name] = options


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="sections, of train,layer,loading,scaling; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each contender")
    parser.add_argument("--pairs", type=int, default=0, help="timed steps of ours and mid2 alone")
    parser.add_argument("--dtype", choices=DTYPES, help="train's shapes of this one; default: all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--note", default="", help="what readers should know about the machine")
    arguments = parser.parse_args()
    if arguments.dtype and arguments.only != "train":
        parser.error("--dtype is for `--only train`: the other sections take no dtype")
    return arguments


def process_counts(device: torch.device) -> list[int]:
    """1, 2 and 4 processes, as far as there are GPUs for them."""
    most = torch.cuda.device_count() if device.type == "cuda" else 4
    return [count for count in (1, 2, 4) if count <= most]


def workloads(device: torch.device) -> list[Workload]:
    """The shapes that fit this kind of machine."""
    return [
        Workload(ModelConfig.model_validate({"preset": preset}), batch, length, dtype, device)
        for preset, dtype, batch, length in WORKLOADS[device.type]
        if dtype == "fp32" or has_bf16(device)
    ]


def training(device: torch.device, arguments: argparse.Namespace, before: list[dict]) -> list[dict]:
    """`train_speed` of every shape, or of those of `--dtype`, behind the others from `before`."""
    chosen = [work for work in workloads(device) if arguments.dtype in (None, work.dtype)]
    if not chosen:
        raise ValueError(f"--dtype {arguments.dtype}: not measured on this kind of machine")
    kept = [row for row in before if arguments.dtype not in (None, row["dtype"])]
    return [*kept, *(train(work, arguments) for work in chosen)]


def train(work: Workload, arguments: argparse.Namespace) -> dict:
    """`train_speed` of one shape, printed as it comes."""
    with one_process(work.device):
        result = train_speed.measure(work, arguments.rounds, arguments.pairs)
    train_speed.print_table({"machine": describe_machine(work.device)} | result)
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def layer(device: torch.device, rounds: int) -> list[dict]:
    """`layer_speed` in the dtypes that count on this kind of machine."""
    known = {"fp32": device.type == "cpu", "bf16": has_bf16(device)}
    dtypes = [dtype for dtype, wanted in known.items() if wanted]
    return [row for dtype in dtypes for row in layer_speed.measure(dtype, rounds, device)]


if __name__ == "__main__":
    main()
