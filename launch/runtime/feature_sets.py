"""`prepare.py features`: passages by human-readable feature, for the analyses."""

from __future__ import annotations

import argparse
from pathlib import Path

from data.features import FeatureSet, build_features

DESCRIPTION = """Build a feature set: balanced passages, none twice, split by document.

    python launch/prepare.py features --input texts --by folder --output languages.jsonl.gz
    python launch/prepare.py features --input /usr/include /usr/lib /usr/share --by extension \\
        --group Python=.py --group 'C headers=.h' --group JavaScript=.js \\
        --group Perl=.pl,.pm --group Shell=.sh --group HTML=.html,.htm --output code.jsonl.gz
    python launch/prepare.py features --input 'pile/*.jsonl.zst' --by field \\
        --label meta.pile_set_name --output subsets.jsonl.gz
"""


def features(arguments: list[str]) -> None:
    """The verb `features`."""
    options = _parse(arguments)
    what = FeatureSet(
        inputs=options.input,
        by=options.by,
        label=options.label,
        groups=_groups(options.group),
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


def _groups(assignments: list[str]) -> dict[str, list[str]]:
    """{"Perl": [".pl", ".pm"]} of "Perl=.pl,.pm"."""
    groups = {}
    for assignment in assignments:
        name, equals, endings = assignment.partition("=")
        groups[name] = [ending for ending in endings.split(",") if ending]
        if not (equals and name and groups[name]):
            raise ValueError(f"--group {assignment}: write NAME=.ending,.ending")
    return groups


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prepare.py features",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH")
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
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl.gz")
    parser.add_argument("--passages", type=int, default=500, help="of each feature (default 500)")
    parser.add_argument("--characters", type=int, default=600, help="a passage's (default 600)")
    parser.add_argument(
        "--per-document", type=int, default=5, help="passages a document gives at most (default 5)"
    )
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(arguments)
    for name in ("passages", "characters", "per_document"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    return options
