"""Score a model with lm-evaluation-harness: one checkpoint, or many of a run.

    python launch/evaluate.py --checkpoint runs/demo --tasks pythia --reference pythia-70m
    python launch/evaluate.py --checkpoint runs/demo --steps all --tasks sciq,piqa --shots 5
    python launch/evaluate.py --checkpoint hf_folder --tasks l2e --task-data benchmarks/
    torchrun --nproc_per_node 8 launch/evaluate.py --checkpoint runs/410m --tasks pythia

The suites: `pythia` is the Pythia paper's table (SciQ, ARC, PIQA, LAMBADA, LogiQA, WinoGrande,
WSC), `l2e` adds MMLU and BIG-bench Lite. Any other task name of the harness works too.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.cli import named, path, run_verb, verb_parser, whole


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    from launch.evaluation.run import score_models  # slow to import; --help should not wait

    score_models(options)


def parser() -> argparse.ArgumentParser:
    result = verb_parser(__doc__, prog="evaluate.py")
    add: Any = result.add_argument
    add(
        "--checkpoint",
        type=named,
        required=True,
        metavar="DIR",
        help="a run's folder, one of its checkpoints, a folder in Hugging Face form, or a hub id",
    )
    add(
        "--steps", default="latest", help="of a run's folder: latest (default), all, or 100,200,..."
    )
    add("--tasks", required=True, help="task and suite names, separated by commas")
    add(
        "--shots",
        type=whole(0),
        default=0,
        metavar="K",
        help="examples before each item (default 0)",
    )
    add(
        "--task-data",
        type=path,
        metavar="DIR",
        help="read items from TASK_SPLIT.jsonl(.gz) files in DIR, not from the hub",
    )
    add("--limit", type=whole(1), metavar="N", help="only the first N items of each task")
    add(
        "--reference",
        metavar="MODEL",
        help="print the official scores of pythia-70m, pythia-410m or pythia-2.8b at the nearest "
        "published step beside ours",
    )
    add("--output", metavar="FILE.json", help="default: results/evaluate_*.json of the run")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the weights; scores are fp32 always",
    )
    add("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    add(
        "--batch-tokens",
        type=whole(1),
        metavar="N",
        help="most tokens of one forward pass (default: 2048 on a CPU, 32768 on a GPU)",
    )
    return result


if __name__ == "__main__":
    run_verb(main)
