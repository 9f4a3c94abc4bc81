"""Text to token files.

    python launch/prepare.py --input 'pile/*.jsonl.zst' --tokenizer 20B_tokenizer.json \\
        --output prepared/pile --workers 16
    python launch/prepare.py --corpus builtin --train-tokenizer sentencepiece --vocab-size 2048 \\
        --output prepared/demo

Three more verbs, each with its own --help:

    python launch/prepare.py show      the sequences of a training step, decoded
    python launch/prepare.py stats     what prepared token files hold
    python launch/prepare.py features  a feature set for the analyses
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import builtin
from data.corpus import Fields, Source, find_sources, read_units
from data.prepare import Preparation, prepare
from data.records import Record, parse
from data.tokenizer import train_sentencepiece
from launch.runtime import feature_sets, hub, looking
from launch.runtime.cli import run_verb


def main() -> None:
    verb, *rest = sys.argv[1:] or [""]
    if verb in ("show", "stats"):
        getattr(looking, verb)(rest)
    elif verb == "features":
        feature_sets.features(rest)
    else:
        build(_parser().parse_args())


def build(options: argparse.Namespace) -> None:
    """Prepare what the command line names; a corpus and its validation set for the built-in."""
    _check(options)
    fields = Fields(options.text_field, options.subset_field)
    if options.corpus == "builtin":
        outputs = {
            options.output: [Source(builtin.TRAIN, "builtin")],
            f"{options.output}_validation": [Source(builtin.VALIDATION, "builtin")],
        }
    else:
        outputs = {options.output: find_sources(options.input)}
    tokenizer = _tokenizer_file(options.tokenizer)
    if options.train_tokenizer:
        tokenizer = tokenizer or Path(f"{options.output}.tokenizer.model")
        texts = _sample(outputs[options.output], fields, options.sample_mb)
        size = options.vocab_size
        trained = train_sentencepiece(texts, tokenizer, size, options.tokenizer_model)
        print(f"{tokenizer}: trained, {trained.vocab_size:,} pieces")
    assert tokenizer is not None
    for output, sources in outputs.items():
        what = Preparation(sources, tokenizer, output, fields, options.workers, options.max_rejects)
        _report(output, prepare(what))


def _tokenizer_file(name: str | None) -> Path | None:
    """The named file, fetched from the Hugging Face hub where that is meant."""
    if name is None or not name.startswith(hub.PREFIX):
        return None if name is None else Path(name)
    return hub.fetch_tokenizer(name)


def _check(options: argparse.Namespace) -> None:
    """What argparse doesn't check; raises ValueError."""
    if not options.tokenizer and not options.train_tokenizer:
        raise ValueError("--tokenizer: missing; name a file, or train one with --train-tokenizer")
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: at least one process has to tokenize")
    if not 0 <= options.max_rejects <= 1:
        raise ValueError(f"--max-rejects {options.max_rejects}: is a share, between 0 and 1")


def _sample(sources: list[Source], fields: Fields, megabytes: float):
    """Texts to train a tokenizer on: the first ones of each source, equally many bytes."""
    for source in sources:
        left = megabytes * 1e6 / len(sources)
        for unit in read_units([source], fields):
            record = parse(unit, fields)
            if isinstance(record, Record):
                yield record.text
                left -= len(record.text)
            if left <= 0:
                break


def _report(output: str, manifest: dict) -> None:
    print(
        f"{output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens "
        f"({manifest['dtype']}), {manifest['text_bytes'] / 1e6:.1f} MB of text"
    )
    rejects = manifest["rejects"]
    if rejects["total"]:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejects["reasons"].items())
        print(f"{rejects['total']:,} records rejected ({reasons}): see {output}.rejects.jsonl")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="files, folders, patterns or hf:owner/name; .jsonl, .parquet, .arrow or text, "
        "plain or .gz, .zst, .xz, .bz2",
    )
    source.add_argument(
        "--corpus", choices=["builtin"], help="the Python installation's own standard library"
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, ..."
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json, sentencepiece .model, or hf:owner/name",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that tokenize (default 1)"
    )
    parser.add_argument("--text-field", default="text", help="where a record keeps its text")
    parser.add_argument(
        "--subset-field", default="meta.pile_set_name", help="where it keeps its subset's name"
    )
    parser.add_argument(
        "--max-rejects",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop when a larger share of the records can't be used (default 0.01)",
    )
    parser.add_argument(
        "--train-tokenizer",
        choices=["sentencepiece"],
        help="train one on a sample, into --tokenizer or PREFIX.tokenizer.model",
    )
    parser.add_argument("--tokenizer-model", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N")
    parser.add_argument(
        "--sample-mb", type=float, default=10.0, metavar="MB", help="text to train it on"
    )
    return parser


if __name__ == "__main__":
    run_verb(main)
