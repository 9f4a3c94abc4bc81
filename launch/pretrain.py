"""Pretrain a GPT-NeoX model while controlling its monosemantic neurons."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.engine.signals import STOP

if __name__ == "__main__":
    STOP.listen()  # before anything that takes its time

import argparse
import logging
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from launch import cli

if TYPE_CHECKING:
    from configs import Config
    from launch.engine.processes import Process

EXAMPLES = """examples:
  python launch/pretrain.py --config configs/demo.json
  deepspeed --num_gpus 8 launch/pretrain.py --config configs/410m.json
  torchrun --nproc-per-node 8 launch/pretrain.py --config configs/410m.json --resume auto
  python launch/pretrain.py --config configs/2.8b.json --dry-run
  python launch/pretrain.py --config configs/70m.json --set l2e.method=none --run-dir runs/baseline
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = cli.verb_parser(__doc__, epilog=EXAMPLES)
    cli.add_configuration(result, required=False)
    cli.add_run_folder(result)
    result.add_argument(
        "--resume",
        type=cli.named,
        metavar="auto|none|PATH",
        default="none",
        help="auto: from the newest intact checkpoint of the run's folder, or from the start "
        "where there is none; PATH: from that checkpoint (default: none)",
    )
    result.add_argument(
        "--profile",
        type=cli.named,
        metavar="STEPS",
        help="write a torch.profiler trace of these steps, e.g. 5 or 5-7, to the run's folder",
    )
    result.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything on one process, print the resolved plan, and stop",
    )
    result.add_argument(
        "--help-config", action="store_true", help="print every configuration key and stop"
    )
    # The deepspeed launcher puts this before our own arguments; the environment has it too.
    result.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Check the configuration before anything is started; then train; the exit status."""
    options = parser().parse_args(arguments)
    if not options.config and not options.help_config:
        parser().error("give --config FILE (for example configs/demo.json), or --help-config")
    import configs

    if options.help_config:
        print(configs.help_text())
        return 0
    from launch.engine import processes

    process = processes.find()
    if not process.is_first:
        logging.getLogger("configs").setLevel(logging.ERROR)  # the first rank tells
    if options.dry_run:
        return rehearse(configs.load(options.config, options.set), options)
    try:
        config = configs.load(options.config, options.set, process.world_size)
    except ValueError:
        if process.is_first:
            raise
        # Every rank finds the same mistake and the first one tells it; it needs the time to,
        # since a launcher ends all ranks when one leaves.
        time.sleep(5)
        sys.exit(2)
    from launch.training.unfailing import unfailing_output

    with unfailing_output():
        return start(config, cli.run_folder(options), options, process)


def rehearse(config: Config, options: argparse.Namespace) -> int:
    """The plan, and what there is to go on from; the exit status. Nothing is written."""
    from launch.planning.summary import print_plan

    print_plan(config)
    folder = cli.run_folder(options)
    if options.resume != "none" or os.path.lexists(folder):  # seconds, which a new run is spared
        from launch.training.rehearsal import rehearse

        for line in rehearse(config, folder, options.resume):
            print(line)
    print("dry run: the configuration is valid; nothing was started")
    return 0


def start(config: Config, folder: Path, options: argparse.Namespace, process: Process) -> int:
    """Find the checkpoint and the data, join the other ranks, and train; the exit status."""
    from launch.checkpoint.resumable import refuse_unlike
    from launch.engine import hardware, joining
    from launch.engine.groups import process_group
    from launch.engine.processes import idle_tasks
    from launch.engine.profiling import Profiler, parse_steps
    from launch.engine.watch import Watch
    from launch.training import data
    from launch.training.agreement import find_together, refuse_other_runs
    from launch.training.folder import (
        claimed,
        refuse_lost_beginning,
        refuse_taken,
        refuse_unusable,
    )
    from launch.training.loop import Run, last_step, nothing_left, train
    from launch.training.position import position_of

    if idle := idle_tasks(process):
        print(idle, flush=True)
    resume = options.resume
    refuse_unusable(folder)
    refuse_taken(folder, resume)
    refuse_unlike(resume)
    hardware.refuse_unsupported(config)
    profiler = Profiler(parse_steps(options.profile), folder / "profile", process.rank)
    STOP.launched = STOP.launched or process.launcher != "alone"
    joined = joining.join(process, timedelta(seconds=config.parallel.join_timeout))
    with Watch(joined, STOP, config.parallel.step_timeout, folder) as watch:
        paths = joining.first_of_host(joined, "data", lambda: data.fetch(config, folder))
        with process_group(joined.process, joined), claimed(folder) as claim:
            run = Run(config, folder, joined.process, profiler, watch, claim)
            # Inside the group, so that the ranks share the hashing of a checkpoint's files.
            refuse_other_runs(config, folder, resume)
            found = find_together(folder, resume)
            if found is None and resume == "auto":
                refuse_lost_beginning(folder, run.say)
            start = position_of(found)
            if start.step >= last_step(config):
                return nothing_left(run, start)
            before = data.data_of(found, run.say) if found is not None else {}
            corpus = data.open_corpus(config, folder, paths, start, before.get("laid_out", ()))
            corpus.hold_against(before, run.say)
            hardware.refuse_beyond_memory(config, joined)
            try:
                return train(run, corpus, start, found)
            except (RuntimeError, MemoryError, OSError) as error:
                told = hardware.in_words(error, config, joined)
                if told is None:
                    raise
                raise ValueError(told) from None


if __name__ == "__main__":
    cli.run_verb(main)
