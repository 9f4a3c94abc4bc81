"""Measure monosemanticity and self-organisation of trained models, one verb each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.cli import run_verb

if TYPE_CHECKING:
    from l2e.analysis.activations import Activations
    from l2e.analysis.networks import Network

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

ABLATED_BY_DEFAULT = 10


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, help_text in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("--output", type=Path, required=True, metavar="DIR", help="results")
        if name not in ("neuromfa", "trajectory"):
            verb.add_argument(
                "--model", required=True, help="folder, checkpoint or owner/name@revision"
            )
        if name not in ("neuromfa",):
            _add_activation_options(verb, name)
        if name in ("neuromfa", "trajectory", "report"):
            _add_checkpoint_options(verb, name)
        if name == "trajectory":
            verb.add_argument(
                "--measures",
                nargs="+",
                default=["scale", "fkr"],
                choices=["scale", "fkr", "probe", "proxies", "neuromfa"],
                help="what to follow over the checkpoints (default: scale fkr)",
            )
        if name in ("ablate", "report"):
            _add_ablation_options(verb, name)
        if name == "decrease":
            _add_decrease_options(verb)
    return parser.parse_args(arguments)


VERBS = {
    "scale": "Monosemantic Scale by feature, probed against random neurons, K-S, layer profile",
    "fkr": "False Killing Rate over the inhibition level k and by layer",
    "probe": "sparse probing: which neurons tell a feature, with permutation control",
    "ablate": "rise of the loss on each feature without one neuron, random neurons as control",
    "decrease": "what one step of SGD does to the most monosemantic activations, by method",
    "proxies": "b*||w||, feature decorrelation, kurtosis and sparsity beside MS",
    "neuromfa": "self-organisation over checkpoints: alpha_0, w, E and their controls",
    "trajectory": "measures over steps and model sizes, seeds as bands",
    "report": "all of it in one self-contained HTML page",
}


def _add_activation_options(verb: argparse.ArgumentParser, name: str) -> None:
    many: dict[str, Any] = {"nargs": "+"} if name == "report" else {}
    verb.add_argument(
        "--features",
        required=name != "trajectory",
        metavar="FILE",
        help="feature passages, .jsonl or .jsonl.gz",
        **many,
    )
    verb.add_argument("--passages", type=int, help="at most so many of each feature (default: all)")
    verb.add_argument("--max-tokens", type=int, default=256, help="cut passages (default: 256)")
    verb.add_argument(
        "--skip",
        type=int,
        default=1,
        help="first tokens that don't count (default: 1; 25 for data subsets, 100 for code)",
    )
    if name in ("scale", "fkr", "probe", "proxies"):
        verb.add_argument(
            "--kind",
            default="pre_mean" if name == "probe" else "post_max",
            choices=["post_max", "post_mean", "pre_max", "pre_mean"],
            help="activation site and aggregation over a passage's tokens (default: %(default)s)",
        )
    verb.add_argument("--stored-as", default="float16", choices=["float16", "float32"])
    verb.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    verb.add_argument(
        "--devices", nargs="+", default=["cpu"], help="e.g. cuda:0 cuda:1 (default: cpu)"
    )
    verb.add_argument(
        "--cache", type=Path, help="where activations are kept (default: OUTPUT/activations)"
    )


def _add_checkpoint_options(verb: argparse.ArgumentParser, name: str) -> None:
    verb.add_argument(
        "--checkpoints",
        nargs="+",
        required=name != "report",
        metavar="DIR",
        help="folders or owner/name@revision; steps are read from names such as step1000",
    )
    verb.add_argument("--networks", type=int, default=10, help="sampled networks (default: 10)")
    verb.add_argument("--sample", type=int, default=64, help="nodes a set, s (default: 64)")
    verb.add_argument(
        "--threshold", type=int, default=150, help="longest distance T (default: 150)"
    )
    verb.add_argument("--hops", type=int, default=1, help="edges of a path (default: 1)")
    verb.add_argument(
        "--layout",
        default="per_head",
        choices=["per_head", "flat"],
        help="rows of GPT-NeoX's fused q, k, v: as they are, or flat as published",
    )


def _add_ablation_options(verb: argparse.ArgumentParser, name: str) -> None:
    if name == "ablate":
        verb.add_argument("--neurons", required=True, help="such as L3.N609,L4.N482")
    verb.add_argument("--random", type=int, default=10, help="random neurons (default: 10)")
    verb.add_argument("--how", default="mean", choices=["mean", "zero", "resample"])
    verb.add_argument(
        "--ablate-passages", type=int, default=50, help="of each feature (default: 50)"
    )
    verb.add_argument("--scored", type=int, help="tokens scored of each passage (default: all)")
    verb.add_argument(
        "--exact",
        type=int,
        metavar="N",
        help="passages of each feature that are run exactly; the others enter to first order, "
        "corrected by these, with a standard error (default: all, or as many as take minutes)",
    )
    verb.add_argument(
        "--precision",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the matrix products; bfloat16 is faster (default: float32)",
    )


def _add_decrease_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--layers",
        default="mid2",
        help="inhibited blocks: mid2, mid_third, top_bottom, all, or numbers such as 2,3 "
        "(default: mid2)",
    )
    verb.add_argument("--topk", type=int, default=10, help="selected of each token (default: 10)")
    verb.add_argument(
        "--learning-rate", type=float, default=0.01, help="of the one step (default: 0.01)"
    )
    verb.add_argument("--batches", type=int, default=8, help="measured batches (default: 8)")


def main(arguments: list[str] | None = None) -> None:
    """Run the verb, write its JSON and figures, and print where they are."""
    options = parse(arguments)
    from l2e.analysis import figures
    from l2e.analysis.results import write_result
    from launch.engine.hardware import keep_freed_memory

    keep_freed_memory()
    if options.verb == "report":
        return _report(options)
    result = {
        "neuromfa": _neuromfa,
        "trajectory": _trajectory,
        "ablate": _ablate,
        "decrease": _decrease,
    }.get(options.verb, _from_activations)(options)
    path = write_result(options.output, options.verb, result)
    drawn = getattr(figures, f"draw_{options.verb}")(result, options.output)
    print(f"wrote {path} and {', '.join(figure.name for figure in drawn)}")


def _network(options: argparse.Namespace, source: str) -> Network:
    import torch
    import transformers

    from l2e.analysis.networks import open_network

    transformers.utils.logging.disable_progress_bar()  # of loading; ours are those to see
    from launch.checkpoint.huggingface import in_hugging_face_form

    source = in_hugging_face_form(source, options.output / "exported")
    return open_network(source, device=options.devices[0], dtype=getattr(torch, options.dtype))


def _activations(options: argparse.Namespace, network: Network, file: str) -> Activations:
    """The activations every verb needs, collected in one pass, or found."""
    from l2e.analysis.activations import Settings, collect
    from l2e.analysis.features import read_features

    features = read_features(file)
    if options.passages:
        features = features.sample(options.passages)
    kinds = dict.fromkeys(["post_max", "pre_mean", getattr(options, "kind", "post_max")])
    settings = Settings(tuple(kinds), options.skip, options.max_tokens, options.stored_as)
    cache = options.cache or options.output / "activations"
    devices = options.devices if len(options.devices) > 1 else None
    return collect(network, features, settings, cache, devices)


def _subject(network: Network, activations: Activations) -> dict:
    """What was measured on what, for the result."""
    return {
        "model": network.name,
        "parameters": network.parameters,
        "features": {
            "name": activations.features.name,
            "passages": activations.features.counts(),
            "passages_left_out": activations.dropped,
            "hash": activations.features.digest(),
        },
    }


def _from_activations(options: argparse.Namespace) -> dict:
    network = _network(options, options.model)
    activations = _activations(options, network, options.features)
    return _analyze(options.verb, network, activations, options.kind)


def _analyze(verb: str, network: Network, activations: Activations, kind: str) -> dict:
    from l2e.analysis.fkr import analyze_fkr
    from l2e.analysis.probing import PROBED_KIND, analyze_probe, find_monosemantic
    from l2e.analysis.proxies import analyze_proxies
    from l2e.analysis.scale import analyze_scale

    if verb == "scale":
        result = analyze_scale(activations, kind, find_monosemantic(activations, PROBED_KIND))
    elif verb == "fkr":
        result = analyze_fkr(activations, kind)
    elif verb == "probe":
        result = analyze_probe(activations, kind)
    else:
        result = analyze_proxies(network, activations, kind)
    return _subject(network, activations) | result


def _ablate(options: argparse.Namespace) -> dict:
    from l2e.analysis.networks import parse_neuron

    neurons = [parse_neuron(name) for name in options.neurons.split(",")]
    return _ablate_neurons(options, _network(options, options.model), options.features, neurons)


def _ablate_neurons(
    options: argparse.Namespace, network: Network, file: str, neurons: list[tuple[int, int]]
) -> dict:
    from l2e.analysis.ablated_runs import Settings
    from l2e.analysis.ablation import analyze_ablation
    from l2e.analysis.features import read_features

    features = read_features(file).sample(options.ablate_passages)
    settings = Settings(
        options.how,
        min(options.max_tokens, 128),
        options.scored,
        options.precision,
        options.exact,
    )
    result = analyze_ablation(network, features, neurons, options.random, settings)
    return {"model": network.name, "passages": features.counts()} | result


def _decrease(options: argparse.Namespace) -> dict:
    from l2e.analysis.decrease import Settings, analyze_decrease
    from l2e.analysis.features import read_features

    network = _network(options, options.model)
    features = read_features(options.features)
    if options.passages:
        features = features.sample(options.passages)
    layers = options.layers
    if layers[0].isdigit():
        layers = [int(number) for number in layers.split(",")]
    tokens = min(options.max_tokens, network.max_positions)
    settings = Settings(layers, options.topk, options.learning_rate, options.batches, tokens)
    return {"model": network.name} | analyze_decrease(network, features, settings)


def _neuromfa(options: argparse.Namespace) -> dict:
    from l2e.analysis.interaction import open_checkpoint
    from l2e.analysis.neuromfa import analyze_neuromfa
    from launch.checkpoint.huggingface import in_hugging_face_form

    exported = options.output / "exported"
    sources = [in_hugging_face_form(source, exported) for source in options.checkpoints]
    checkpoints = [open_checkpoint(source) for source in sources]
    checkpoints.sort(key=lambda one: -1 if one.step is None else one.step)
    return analyze_neuromfa(checkpoints, _interaction_settings(options))


def _interaction_settings(options: argparse.Namespace):
    from l2e.analysis.neuromfa import Settings

    return Settings(
        options.networks, options.sample, options.threshold, options.hops, options.layout
    )


def _trajectory(options: argparse.Namespace) -> dict:
    from l2e.analysis.interaction import open_checkpoint, step_of
    from l2e.analysis.trajectory import MEASURES, gather, neuromfa_points, run_of
    from launch.checkpoint.huggingface import in_hugging_face_form

    on_activations = [name for name in options.measures if name in MEASURES]
    if on_activations and not options.features:
        raise ValueError(f"--measures {' '.join(on_activations)}: give --features FILE as well")
    points = []
    for source in options.checkpoints:
        network = _network(options, source)
        measures: dict = {}
        if on_activations:
            activations = _activations(options, network, options.features)
            for name in on_activations:
                measures |= MEASURES[name](network, activations)
        size = network.parameters
        points.append(
            {"name": source, "step": step_of(source), "parameters": size, "measures": measures}
        )
    if "neuromfa" in options.measures:
        for run in dict.fromkeys(run_of(point["name"]) for point in points):
            own = [point for point in points if run_of(point["name"]) == run]
            exported = options.output / "exported"
            sources = [in_hugging_face_form(point["name"], exported) for point in own]
            series = [open_checkpoint(source) for source in sources]
            found = neuromfa_points(series, _interaction_settings(options))
            for point, measures in zip(own, found, strict=True):
                point["measures"] |= measures
    return gather(points)


def _report(options: argparse.Namespace) -> None:
    """Every verb on every feature file, then the page."""
    from l2e.analysis import figures
    from l2e.analysis.networks import parse_neuron
    from l2e.analysis.probing import PROBED_KIND, Probe
    from l2e.analysis.report import top_neurons, write_report
    from l2e.analysis.results import read_result, write_result
    from l2e.analysis.scale import analyze_scale

    sections: list[tuple[str, str, dict, list[Path]]] = []

    def keep(folder: Path, verb: str, result: dict) -> None:
        """At once, so that what was measured outlives an interruption."""
        write_result(folder, verb, result)
        images = getattr(figures, f"draw_{verb}")(result, folder)
        sections.append((folder.name, verb, read_result(folder, verb) or {}, images))

    network = _network(options, options.model)
    for file in options.features:
        folder = options.output / Path(file).name.split(".")[0]
        activations = _activations(options, network, file)
        for verb in ("fkr", "proxies"):
            keep(folder, verb, _analyze(verb, network, activations, "post_max"))
        probe = _analyze("probe", network, activations, PROBED_KIND)
        keep(folder, "probe", probe)
        monosemantic = [Probe(**row) for row in probe["neurons"]]
        scale = analyze_scale(activations, "post_max", monosemantic)
        keep(folder, "scale", _subject(network, activations) | scale)
        neurons = [parse_neuron(name) for name in top_neurons(probe, ABLATED_BY_DEFAULT)]
        keep(folder, "ablate", _ablate_neurons(options, network, file, neurons))
    if options.checkpoints:
        keep(options.output, "neuromfa", _neuromfa(options))
    print(f"wrote {write_report(options.output / 'report.html', options.model, sections)}")


if __name__ == "__main__":
    run_verb(main)
