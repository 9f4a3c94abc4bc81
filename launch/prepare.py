"""Text to token files.

    python launch/prepare.py --input 'pile/*.jsonl.zst' --tokenizer 20B_tokenizer.json \\
        --output prepared/pile --workers 16
    python launch/prepare.py --corpus builtin --train-tokenizer sentencepiece --vocab-size 2048 \\
        --output prepared/demo

Four more verbs, each with its own --help:

    python launch/prepare.py join      shares made with --shard, joined
    python launch/prepare.py show      the sequences of a training step, decoded
    python launch/prepare.py stats     what prepared token files hold
    python launch/prepare.py features  a feature set for the analyses
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import builtin, hub
from data.corpus import Fields, Found, Source, look_over, read_units
from data.features import FeaturePreparation, build_features
from data.formats import DESCRIPTIONS
from data.join import join
from data.limits import Limits
from data.prepare import Preparation, prepare
from data.records import Record, parse
from data.shares import Share
from data.tokenizer import load_tokenizer, train_sentencepiece
from l2e.hub import is_hub
from launch import cli

SHOWN_NAMES = 3  # of the files of a kind
JOIN = """Join the shares of a corpus, each prepared with --shard, to what one run would have made.

    python launch/prepare.py --input pile --tokenizer 20B_tokenizer.json \\
        --shard 1/2 --output prepared/share-1
    python launch/prepare.py --input pile --tokenizer 20B_tokenizer.json \\
        --shard 2/2 --output prepared/share-2
    python launch/prepare.py join prepared/share-1 prepared/share-2 --output prepared/pile
"""
SHOW = """Print the sequences of a training step, decoded, with where each part is from.

    python launch/prepare.py show --config configs/demo.json --step 100
    python launch/prepare.py show --config configs/410m.json --step 1000 \\
        --set data.path=preshuffled/document --set tokenizer.path=20B_tokenizer.json
"""
STATS = """Print what prepared token files hold: subsets, lengths, duplicates; checks their hashes.

    python launch/prepare.py stats prepared/pile
"""
FEATURES = """Build a feature set: balanced passages, none twice, split by document.

    python launch/prepare.py features --input texts --by folder --output languages.jsonl.gz
    python launch/prepare.py features --input /usr/include /usr/lib /usr/share --by extension \\
        --group Python=.py --group 'C headers=.h' --group JavaScript=.js \\
        --group Perl=.pl,.pm --group Shell=.sh --group HTML=.html,.htm --output code.jsonl.gz
    python launch/prepare.py features --input 'pile/*.jsonl.zst' --by field \\
        --label meta.pile_set_name --output subsets.jsonl.gz
"""


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in VERBS:
        VERBS[words[0]](words[1:])
    else:
        build(parser().parse_args(words))


def build(options: argparse.Namespace) -> None:
    """Prepare what the command line names; a corpus and its validation set for the built-in."""
    check(options)
    fields = Fields(options.text_field, options.subset_field)
    if options.corpus == "builtin":
        outputs = {
            options.output: Found([Source(builtin.TRAIN, "builtin")], {}),
            f"{options.output}_validation": Found([Source(builtin.VALIDATION, "builtin")], {}),
        }
    else:
        outputs = {options.output: look_over(options.input)}
        describe(outputs[options.output])
    tokenizer = tokenizer_file(options.tokenizer)
    if options.train_tokenizer:
        tokenizer = tokenizer or Path(f"{options.output}.tokenizer.model")
        texts = sample(outputs[options.output].sources, fields, options.sample_mb)
        size = options.vocab_size
        trained = train_sentencepiece(texts, tokenizer, size, options.tokenizer_model)
        print(f"{tokenizer}: trained, {trained.vocab_size:,} pieces")
    assert tokenizer is not None
    loaded = load_tokenizer(tokenizer, options.end_of_text)
    print(f"documents end with {loaded.name_of(loaded.eod)!r} (id {loaded.eod})", flush=True)
    for output, (sources, passed_over) in outputs.items():
        share = Share.parse(options.shard, sources) if options.shard else None
        what = Preparation(
            sources=share.own() if share else sources,
            tokenizer=tokenizer,
            output=output,
            fields=fields,
            workers=options.workers,
            limits=limits_of(options),
            end_of_text=options.end_of_text,
            passed_over=passed_over,
            share=share,
        )
        report(output, prepare(what))


def describe(found: Found) -> None:
    """A line for each format: what is read as what; and one for each reason not to read."""
    formats: dict[str, list[str]] = {}
    for source in found.sources:
        formats.setdefault(DESCRIPTIONS[source.format], []).append(source.name)
    for name, files in formats.items():
        print(f"read as {name}: {listed(files)}")
    for reason, files in found.passed_over.items():
        print(f"not read, {reason}: {listed(files)}")


def listed(files: list[str]) -> str:
    shown = ", ".join(files[:SHOWN_NAMES]) + (", ..." if len(files) > SHOWN_NAMES else "")
    return f"{len(files):,} ({shown})"


def tokenizer_file(name: str | None) -> Path | None:
    """The named file, fetched from the Hugging Face hub where that is meant."""
    if name is None:
        return None
    return hub.fetch_tokenizer(name) if is_hub(name) else Path(name)


def check(options: argparse.Namespace) -> None:
    """What argparse doesn't check; raises ValueError."""
    if not options.tokenizer and not options.train_tokenizer:
        raise ValueError("--tokenizer: missing; name a file, or train one with --train-tokenizer")
    if options.shard and (options.train_tokenizer or options.corpus):
        raise ValueError(
            "--shard: every share needs the same tokenizer and --input files; train it before, "
            "and name it with --tokenizer"
        )
    if options.train_tokenizer and not (options.tokenizer or ".model").endswith(".model"):
        raise ValueError(f"--tokenizer {options.tokenizer}: a trained one is written to a .model")


def sample(sources: list[Source], fields: Fields, megabytes: float):
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


def report(output: str, manifest: dict) -> None:
    print(
        f"{output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens "
        f"({manifest['dtype']}), {manifest['text_bytes'] / 1e6:.1f} MB of text"
    )
    subsets = manifest["subsets"]
    if set(subsets) == {""}:
        field = manifest["job"]["fields"]["subset"]
        print(f"no record names its subset in {field!r}; --subset-field names another field")
    elif subsets:
        print(f"subsets: {listed(list(subsets))}")
    rejects = manifest["rejects"]
    if rejects["total"]:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejects["reasons"].items())
        print(f"{rejects['total']:,} records rejected ({reasons}): see {output}.rejects.jsonl")
    for line in about_wording(manifest.get("wording", {}), manifest):
        print(line)


def about_wording(wording: dict, manifest: dict) -> Iterator[str]:
    """What of the texts has no token, and what in them reads as the end of one."""
    if wording.get("unknown_ids"):
        characters = wording["unknown_characters"] / wording["characters"]
        ids = wording["unknown_ids"] / manifest["tokens"]
        yield (
            f"the tokenizer has nothing for {wording['unknown_characters']:,} characters "
            f"({characters:.2%}), as in {wording['example']!r}; {wording['unknown_ids']:,} "
            f"unknown ids ({ids:.2%}) stand for them, or would if it had one"
        )
    if wording.get("empty_documents"):
        yield f"{wording['empty_documents']:,} documents have no token but their end"
    for name, count in wording.get("end_of_text_written_out", {}).items():
        yield f"{name!r} is written out {count:,} times in the texts themselves"
    if wording.get("end_of_text_ids"):
        yield (
            f"{wording['end_of_text_ids']:,} of the tokens {manifest['end_of_text_token']!r} come "
            "from the texts themselves, where they end no document"
        )


def join_shares(arguments: list[str]) -> None:
    """The verb `join`."""
    parser = cli.verb_parser(JOIN, prog="prepare.py join")
    parser.add_argument("prefix", nargs="+", help="the --output of a share, each once")
    parser.add_argument(
        "--output", type=cli.prefix, required=True, metavar="PREFIX", help="of the joined files"
    )
    add_limits(parser)
    options = parser.parse_args(arguments)
    report(options.output, join(options.prefix, options.output, limits_of(options)))


def limits_of(options: argparse.Namespace) -> Limits:
    return Limits(options.max_rejects, options.max_unknown)


def add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-rejects",
        type=cli.number(0, 1),
        default=0.01,
        metavar="SHARE",
        help="stop when a larger share of the records, of a file or of all, can't be used "
        "(default 0.01)",
    )
    parser.add_argument(
        "--max-unknown",
        type=cli.number(0, 1),
        default=0.01,
        metavar="SHARE",
        help="stop when the tokenizer has nothing for a larger share of the text (default 0.01)",
    )


def parser() -> argparse.ArgumentParser:
    result = cli.verb_parser(__doc__, prog="prepare.py")
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        type=cli.named,
        nargs="+",
        metavar="FILE",
        help="files, folders, patterns or hf:owner/name; JSON lines (.jsonl .json .jl .ndjson), "
        ".parquet, .arrow or text, plain or .gz .zst .xz .bz2; other endings by their content",
    )
    source.add_argument(
        "--corpus", choices=["builtin"], help="the Python installation's own standard library"
    )
    result.add_argument(
        "--output",
        type=cli.prefix,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx, ...",
    )
    result.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json, sentencepiece .model, or hf:owner/name",
    )
    result.add_argument(
        "--workers",
        type=cli.whole(1),
        default=1,
        metavar="N",
        help="processes that tokenize (default 1)",
    )
    result.add_argument("--text-field", default="text", help="where a record keeps its text")
    result.add_argument(
        "--subset-field", default="meta.pile_set_name", help="where it keeps its subset's name"
    )
    add_limits(result)
    result.add_argument(
        "--end-of-text",
        metavar="TOKEN",
        help="the token that ends documents (default: the tokenizer's own)",
    )
    result.add_argument(
        "--shard",
        type=cli.named,
        metavar="K/N",
        help="prepare the K-th of N equal shares of the input only; `join` joins them",
    )
    result.add_argument(
        "--train-tokenizer",
        choices=["sentencepiece"],
        help="train one on a sample, into --tokenizer or PREFIX.tokenizer.model",
    )
    result.add_argument("--tokenizer-model", choices=["bpe", "unigram"], default="bpe")
    result.add_argument("--vocab-size", type=cli.whole(1), default=8192, metavar="N")
    result.add_argument(
        "--sample-mb",
        type=cli.number(0, above=True),
        default=10.0,
        metavar="MB",
        help="text to train it on",
    )
    return result


def show(arguments: list[str]) -> None:
    """The verb `show`."""
    parser = cli.verb_parser(SHOW, prog="prepare.py show")
    cli.add_configuration(parser)
    cli.add_run_folder(parser)
    parser.add_argument("--step", required=True, type=cli.whole(0), help="training step, from 0")
    parser.add_argument(
        "--rows", type=cli.whole(1), default=4, help="sequences to print (default 4)"
    )
    parser.add_argument(
        "--characters", type=cli.whole(1), default=600, help="text to print of each (default 600)"
    )
    options = parser.parse_args(arguments)
    import configs
    from data.show import describe_step
    from launch.training import data

    config = configs.load(options.config, options.set)
    folder = cli.run_folder(options)
    paths = data.fetch(config, folder)
    samples = config.train.steps * config.train.global_batch_size
    lines = describe_step(
        data.open_training(config, folder, paths, 0, samples),
        load_tokenizer(paths.tokenizer) if paths.tokenizer else None,
        options.step,
        config.train.global_batch_size,
        options.rows,
        options.characters,
    )
    for line in lines:
        print(line)


def stats(arguments: list[str]) -> None:
    """The verb `stats`."""
    parser = cli.verb_parser(STATS, prog="prepare.py stats")
    parser.add_argument("prefix", nargs="+", help="prefix of a .bin/.idx pair")
    options = parser.parse_args(arguments)
    from data.stats import describe_corpus

    for prefix in options.prefix:
        for line in describe_corpus(prefix):
            print(line)


def features(arguments: list[str]) -> None:
    """The verb `features`."""
    options = features_options(arguments)
    what = FeaturePreparation(
        inputs=options.input,
        by=options.by,
        label=options.label,
        groups=groups_of(options.group),
        passages=options.passages,
        characters=options.characters,
        per_document=options.per_document,
        seed=options.seed,
    )
    built = build_features(what, options.output)
    for name, documents in built["documents"].items():
        print(f"{name}: {built['passages']} passages of {documents} documents")
    for name, count in built["left_out"].items():
        print(f"left out: {name}, which has {count} passages only")
    for reason, count in built["passed_over"].items():
        print(f"not used, {reason}: {count:,}")


def groups_of(assignments: list[str]) -> dict[str, list[str]]:
    """{"Perl": [".pl", ".pm"]} of "Perl=.pl,.pm"."""
    groups = {}
    for assignment in assignments:
        name, equals, endings = assignment.partition("=")
        groups[name] = [ending for ending in endings.split(",") if ending]
        if not (equals and name and groups[name]):
            raise ValueError(f"--group {assignment}: write NAME=.ending,.ending")
    return groups


def features_options(arguments: list[str]) -> argparse.Namespace:
    parser = cli.verb_parser(FEATURES, prog="prepare.py features")
    parser.add_argument("--input", type=cli.named, nargs="+", required=True, metavar="PATH")
    parser.add_argument(
        "--by",
        choices=["folder", "extension", "field"],
        required=True,
        help="a feature is a sub-folder of the input, a file's ending, or a field of the records",
    )
    parser.add_argument("--label", default="feature", help="the field, for --by field")
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=.END,.END",
        help="put endings together; others are then left out; may be repeated",
    )
    parser.add_argument("--output", type=cli.path, required=True, metavar="FILE.jsonl.gz")
    parser.add_argument(
        "--passages", type=cli.whole(1), default=500, help="of each feature (default 500)"
    )
    parser.add_argument(
        "--characters", type=cli.whole(1), default=600, help="a passage's (default 600)"
    )
    parser.add_argument(
        "--per-document",
        type=cli.whole(1),
        default=5,
        help="passages a document gives at most (default 5)",
    )
    parser.add_argument("--seed", type=cli.whole(0), default=42)
    return parser.parse_args(arguments)


VERBS = {"join": join_shares, "show": show, "stats": stats, "features": features}

if __name__ == "__main__":
    cli.run_verb(main)
