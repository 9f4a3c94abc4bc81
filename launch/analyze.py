"""Measure monosemanticity and self-organisation of trained models, one verb each."""

from __future__ import annotations

import argparse
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from l2e.analysis import Subject, analyses
from l2e.analysis.analysis import Analysis, Options, allowed
from l2e.analysis.subject import ActivationOptions, ModelOptions, PassageOptions, SubjectOptions
from launch import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = """examples:
  python launch/analyze.py scale --model EleutherAI/pythia-70m --features languages.jsonl.gz \\
      --output results
  python launch/analyze.py fkr --model runs/demo/checkpoints/step_0001000 \\
      --features languages.jsonl --output results
  python launch/analyze.py ablate --model EleutherAI/pythia-70m --features languages.jsonl.gz \\
      --neurons L3.N609,L4.N482 --output results
  python launch/analyze.py decrease --model EleutherAI/pythia-70m --features languages.jsonl.gz \\
      --layers mid2 --output results
  python launch/analyze.py neuromfa --checkpoints runs/demo/checkpoints/step_* --output results
  python launch/analyze.py report --model M --features A.jsonl B.jsonl --output results

A feature file has lines {"text": ..., "feature": ...}. A model is a folder in Hugging Face form
(GPT-NeoX, GPT-2, Llama), a checkpoint of this trainer, or a Hugging Face id, with @revision if
wanted. Each verb writes OUTPUT/VERB.json and its figures.
"""
REPORT = "all of it in one self-contained HTML page"
# What the options of each part are.
PARTS: dict[str, type[Options]] = {
    "model": ModelOptions,
    "features": PassageOptions,
    "activations": ActivationOptions,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.verb_parser(__doc__, epilog=EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for analysis in analyses().values():
        verb = _add_verb(verbs, analysis.name, analysis.help)
        parts: set[str] = {*analysis.on, *analysis.optional}
        if "model" in parts:
            _add_model(verb)
        if "features" in parts:
            _add_features(verb, required="features" in analysis.on)
        if "checkpoints" in parts:
            _add_checkpoints(verb, required=True)
        if "activations" in parts:
            parts.add("model")  # which they are collected from
        for one in _shared(parts):
            _add_option(verb, one)
        for one in fields(analysis.options):
            _add_option(verb, one)
    report = _add_verb(verbs, "report", REPORT)
    _add_model(report)
    _add_features(report, required=True, nargs="+")
    _add_checkpoints(report, required=False)
    for one in (*_shared(set(PARTS)), *_common_options()):
        _add_option(report, one)
    return parser.parse_args(arguments)


def _add_verb(verbs: Any, name: str, told: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=told,
        description=told,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--output", type=cli.path, required=True, metavar="DIR", help="results")
    return verb


def _add_model(verb: argparse.ArgumentParser) -> None:
    told = "folder, checkpoint or owner/name@revision"
    verb.add_argument("--model", type=cli.named, required=True, help=told)


def _add_features(verb: argparse.ArgumentParser, **settings: Any) -> None:
    told = "feature passages, .jsonl or .jsonl.gz"
    verb.add_argument("--features", metavar="FILE", help=told, **settings)


def _add_checkpoints(verb: argparse.ArgumentParser, required: bool) -> None:
    verb.add_argument(
        "--checkpoints",
        nargs="+",
        required=required,
        metavar="DIR",
        help="folders or owner/name@revision; steps are read from the last part of their names: "
        "step1000, checkpoint-1000",
    )


def _shared(parts: set[str]) -> Iterator[Field]:
    """The options of how those parts are read."""
    for part, options in PARTS.items():
        if part in parts:
            yield from fields(options)


def _common_options() -> list[Field]:
    """The options of a report: those of all analyses, but not where theirs differ in meaning, as
    `kind` does."""
    found: dict[str, Field] = {}
    differing = set()
    for analysis in analyses().values():
        for one in fields(analysis.options):
            if found.setdefault(one.name, one).default != one.default:
                differing.add(one.name)
    return [one for name, one in found.items() if name not in differing]


def _add_option(verb: argparse.ArgumentParser, one: Field) -> None:
    """A field of an `Options` as a flag, with its bounds."""
    known = one.metadata
    told, settings = known["help"], dict(known["more"])
    if one.default is not None and "default" not in told:
        shown = " ".join(one.default) if isinstance(one.default, tuple) else one.default
        told += f" (default: {shown})"
    if choices := allowed(known):
        settings["choices"] = choices
    elif known["of"] is int:
        settings["type"] = cli.whole(known["least"], known["most"])
    elif known["of"] is float:
        settings["type"] = cli.number(known["least"], known["most"])
    flag = f"--{one.name.replace('_', '-')}"
    verb.add_argument(flag, default=one.default, help=told, **settings)


def main(arguments: list[str] | None = None) -> None:
    """Run the verb, write its JSON and figures, and print where they are."""
    options = parse(arguments)
    cli.refuse_unwritable(options.output, is_folder=True)
    import transformers

    from launch.engine.hardware import keep_freed_memory

    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()  # of loading; ours are those to see
    if options.verb == "report":
        return _report(options)
    analysis = analyses()[options.verb]
    subject = _subject(options, getattr(options, "model", None), getattr(options, "features", None))
    result = analysis.run(subject, _chosen(analysis.options, options))
    result.to_json(options.output)
    drawn = ", ".join(f"{panel.name}.png" for panel in result.plot(options.output))
    print(f"wrote {options.output / analysis.name}.json and {drawn}")


def _chosen(kind: type[Options], options: argparse.Namespace) -> Any:
    """Those options of the command line that are of this kind."""
    names = {one.name for one in fields(kind)} & set(vars(options))
    return kind(**{name: getattr(options, name) for name in names})


def _subject(options: argparse.Namespace, model: Any, features: Any) -> Subject:
    def in_hugging_face_form(source: str) -> str:
        from launch.checkpoint.huggingface import in_hugging_face_form

        return in_hugging_face_form(source, options.output / "exported")

    chosen = _chosen(SubjectOptions, options)
    how = {one.name: getattr(chosen, one.name) for one in fields(chosen)}
    how["cache"] = how["cache"] or str(options.output / "activations")
    checkpoints = getattr(options, "checkpoints", None) or ()
    return Subject(model, features, checkpoints, in_hugging_face_form, **how)


def _report(options: argparse.Namespace) -> None:
    """Every analysis on every feature file, then those of weights alone, then the page."""
    from l2e.analysis.features import read_feature_files
    from l2e.analysis.report import ReportSection, write_report

    sets = read_feature_files(options.features)
    network = _subject(options, options.model, None).network
    subjects = [_subject(options, network, features) for features in sets]
    sections: list[ReportSection] = []

    def add(analysis: Analysis, subject: Subject, folder: Path) -> None:
        if "checkpoints" in analysis.on and not options.checkpoints:
            reason = "no --checkpoints were named"
            sections.append(ReportSection(analysis, folder.name, reason))
            return
        try:
            result = analysis.run(subject, _chosen(analysis.options, options))
        except ValueError as error:  # told in its place; the others go on
            print(f"{analysis.name} on {folder.name}: not measured: {error}", file=sys.stderr)
            sections.append(ReportSection(analysis, folder.name, str(error)))
            return
        result.to_json(folder)  # at once, so that what was measured outlives an interruption
        result.plot(folder)
        sections.append(ReportSection(analysis, folder.name, result))

    of_passages = [a for a in analyses().values() if "features" in {*a.on, *a.optional}]
    for subject in subjects:
        for analysis in of_passages:
            add(analysis, subject, options.output / subject.all_features.name)
    for analysis in analyses().values():
        if analysis not in of_passages:
            add(analysis, subjects[0], options.output)
    print(f"wrote {write_report(options.output / 'report.html', options.model, sections)}")


if __name__ == "__main__":
    cli.run_verb(main)
