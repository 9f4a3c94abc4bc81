"""`prepare.py show` and `prepare.py stats`: what a step's batch and a corpus hold."""

from __future__ import annotations

import argparse
from pathlib import Path

SHOW = """Print the sequences of a training step, decoded, with where each part is from.

    python launch/prepare.py show --config configs/demo.json --step 100
    python launch/prepare.py show --config configs/410m.json --step 1000 \\
        --set data.path=preshuffled/document --set tokenizer.path=20B_tokenizer.json
"""
STATS = """Print what prepared token files hold: subsets, lengths, duplicates; checks their hashes.

    python launch/prepare.py stats prepared/pile
"""


def show(arguments: list[str]) -> None:
    """The verb `show`."""
    parser = _parser("show", SHOW)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's configuration")
    parser.add_argument("--step", required=True, type=int, help="training step, from 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run", metavar="DIR", help="the run's folder, as for pretrain.py")
    parser.add_argument("--rows", type=int, default=4, help="sequences to print (default 4)")
    parser.add_argument(
        "--characters", type=int, default=600, help="text to print of each (default 600)"
    )
    options = parser.parse_args(arguments)
    import configs
    from data import load_tokenizer, manifest
    from data.show import describe_step
    from launch.runtime import corpus

    config = configs.load(options.config, options.set)
    folder = Path(options.run or Path("runs") / Path(options.config).stem)
    paths = corpus.fetch(config, folder)
    prepared_with = None
    if isinstance(paths.training, str):
        prepared_with = manifest.recorded(paths.training, "tokenizer_path")
    tokenizer = paths.tokenizer or prepared_with
    lines = describe_step(
        corpus.open_training(config, folder, paths),
        load_tokenizer(tokenizer) if tokenizer else None,
        options.step,
        config.train.global_batch_size,
        options.rows,
        options.characters,
    )
    for line in lines:
        print(line)


def stats(arguments: list[str]) -> None:
    """The verb `stats`."""
    parser = _parser("stats", STATS)
    parser.add_argument("prefix", nargs="+", help="prefix of a .bin/.idx pair")
    options = parser.parse_args(arguments)
    from data.stats import describe_corpus

    for prefix in options.prefix:
        for line in describe_corpus(prefix):
            print(line)


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"prepare.py {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
