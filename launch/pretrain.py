"""Pretrain a GPT-NeoX model while controlling its monosemantic neurons."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.runtime.cli import run_verb  # noqa: E402

EXAMPLES = """examples:
  python launch/pretrain.py --config configs/demo.json
  deepspeed --num_gpus 8 launch/pretrain.py --config configs/410m.json
  torchrun --nproc-per-node 8 launch/pretrain.py --config configs/410m.json --resume auto
  python launch/pretrain.py --config configs/2.8b.json --dry-run
  python launch/pretrain.py --config configs/70m.json --set l2e.method=none --run runs/baseline
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="the run's configuration, a JSON file")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one key, e.g. train.steps=100; may be repeated",
    )
    parser.add_argument(
        "--run", metavar="DIR", help="the run's folder (default: runs/ and the config's name)"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|none|PATH",
        default="none",
        help="auto: from the newest intact checkpoint of the run's folder, or from the start "
        "where there is none; PATH: from that checkpoint (default: none)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything on one process, print the resolved plan, and stop",
    )
    parser.add_argument(
        "--help-config", action="store_true", help="print every configuration key and stop"
    )
    # The deepspeed launcher puts this before our own arguments; the environment has it too.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.config and not options.help_config:
        parser.error("give --config FILE (for example configs/demo.json), or --help-config")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Check the configuration before anything is started; then train."""
    options = parse(arguments)
    import configs

    if options.help_config:
        print(configs.help_text())
        return
    from launch.runtime import processes

    process = processes.find()
    if options.dry_run:
        from launch.runtime.plan import print_plan

        print_plan(configs.load(options.config, options.set))
        return
    config = configs.load(options.config, options.set, process.world_size)
    folder = Path(options.run or Path("runs") / Path(options.config).stem)
    start(config, folder, options.resume, process)


def start(config, folder: Path, resume: str, process) -> None:
    """Prepare the run's folder and data, join the other ranks, and train."""
    from launch.runtime import corpus, resuming

    resuming.check_folder(folder, resume)
    prepared = corpus.prepare(config, folder, process)
    from launch.runtime.processes import process_group
    from launch.runtime.training import Run, train

    with process_group(process):
        train(Run(config, folder, process), prepared, resume)


if __name__ == "__main__":
    run_verb(main)
