"""One self-contained HTML page of results: figures embedded, tables, and the exact command."""

import base64
import html
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; display: block; margin: 1rem 0; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
.note { color: #555; }
"""

TITLES = {
    "scale": "Monosemantic Scale",
    "fkr": "False Killing Rate",
    "probe": "Sparse probing",
    "ablate": "Ablation",
    "proxies": "Proxies",
    "neuromfa": "Self-organisation (NeuroMFA)",
    "trajectory": "Over steps and sizes",
}


def write_report(path: Path, title: str, sections: list[tuple[str, str, dict, list[Path]]]) -> Path:
    """Write the page. sections: (where, verb, the verb's result, its figures), in order."""
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
        *_subject([result for _, _, result, _ in sections]),
    ]
    for where, verb, result, images in sections:
        parts.append(f"<h2>{TITLES[verb]}: {html.escape(where)}</h2>")
        parts += [f"<p>{note}</p>" for note in _notes(verb, result)]
        parts += [_table(*table) for table in _tables(verb, result)]
        parts += [_image(image) for image in images]
    parts.append(_origin(sections[-1][2]["provenance"]))  # one command made them all
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n</html>\n")
    return path


def _subject(results: list[dict]) -> list[str]:
    """The model's size and the feature sets, as far as the results tell them."""
    size = next((result["parameters"] for result in results if "parameters" in result), None)
    told = [] if size is None else [f"{size:,} parameters."]
    sets = {one["features"]["name"]: one["features"] for one in results if "features" in one}
    for name, features in sets.items():
        passages = features["passages"]
        told.append(f"{name}: {sum(passages.values()):,} passages of {len(passages)} features.")
    return [f"<p>{html.escape(' '.join(told))}</p>"] if told else []


def top_neurons(probe: dict, count: int) -> list[str]:
    """The best-probing neurons to ablate: the best of each feature in turn, each neuron once."""
    ranks: dict[str, int] = {}
    order = []
    for row in probe["neurons"]:
        rank = ranks[row["feature"]] = ranks.get(row["feature"], -1) + 1
        order.append((rank, -row["f1"], f"L{row['layer']}.N{row['neuron']}"))
    return list(dict.fromkeys(name for _, _, name in sorted(order)))[:count]


def _notes(verb: str, result: dict) -> list[str]:
    """One or two sentences that read the numbers."""
    if verb == "scale" and result["ks"] is not None:
        return [
            "K-S statistic between the scores of the relatively monosemantic features and of the "
            f"whole set: {result['ks']:.3f}."
        ]
    if verb == "fkr":
        least = result["least"]
        return [
            f"Least FKR {_percent(least['fkr'])} at k = {_percent(least['k'])}; killing at random "
            f"would give {_percent(result['at_random'])}."
        ]
    if verb == "probe":
        passages = result["passages"]
        return [
            f"{result['neurons_probed']:,} one-neuron probes out of {result['neurons_ranked']:,} "
            f"ranked neurons, fitted on {passages['train']:,} passages and scored on "
            f"{passages['held_out']:,}. The same search with shuffled labels is the control."
        ]
    if verb == "ablate":
        return [
            f"Activation replaced ({result['how']}); rise of the next-token loss in percent. "
            "Random neurons of the same layers are the control.",
            *_sampled(result),
        ]
    if verb == "proxies":
        value = result["layer_rank_correlation"]["decorrelation_and_ms"]
        known = "not defined" if value is None else f"{value:.2f}"
        return [f"Rank correlation of feature decorrelation with MS over layers: {known}."]
    if verb == "neuromfa":
        return [
            "E moves with the mere scale of the weights. Read it beside the same analysis on "
            "weights rescaled to step 0's RMS, and on shuffled and Gaussian weights: an E that "
            "they share is no sign of structure."
        ]
    return []


def _sampled(ablate: dict) -> list[str]:
    """How far an ablation that was estimated can be off; nothing of one that was exact."""
    if ablate["exact_passages"] is None:
        return []
    rows = [*ablate["neurons"], *ablate["random"]]
    largest = max(error for row in rows for error in row["increase_percent_stderr"].values())
    correlation = ablate["first_order_correlation"]
    known = "not defined" if correlation is None else f"{correlation:.2f}"
    return [
        f"{ablate['exact_passages']} passages of each feature were run exactly, the others to "
        f"first order (correlation of both: {known}); the largest standard error is "
        f"{largest:.2g} percentage points."
    ]


def _tables(verb: str, result: dict) -> list[tuple[list[str], list[list]]]:
    if verb == "probe":
        best: dict[str, dict] = {}
        for row in result["neurons"]:
            best.setdefault(row["feature"], row)
        head = ["feature", "best neuron", "F1", "MCC", "precision", "recall"]
        head += ["F1, labels shuffled", "F1, always yes"]
        return [
            (
                head,
                [
                    [
                        feature,
                        f"L{row['layer']}.N{row['neuron']}",
                        *(row[key] for key in ("f1", "mcc", "precision", "recall")),
                        result["permutation"][feature]["f1"],
                        result["always_yes_f1"][feature],
                    ]
                    for feature, row in sorted(best.items())
                ],
            )
        ]
    if verb == "fkr":
        rows = [[_percent(p["k"]), _percent(p["fkr"])] for p in result["curve"]]
        return [(["k", "FKR"], rows)]
    if verb == "scale":
        head = ["layer", "mean MS", "K-S", "neurons", "dead"]
        keys = ("layer", "mean_ms", "ks", "neurons", "dead")
        return [(head, [[row.get(key) for key in keys] for row in result["layers"]])]
    if verb == "proxies":
        measures = ("layer", "ms", "bias_norm", "kurtosis", "sparsity", "decorrelation")
        head = ["layer", "MS", "b·||w||", "kurtosis", "sparsity", "decorrelation"]
        return [(head, [[row[key] for key in measures] for row in result["layers"]])]
    if verb == "ablate":
        features = list(result["loss"])
        head = ["neurons", *features]
        return [
            (
                head,
                [
                    ["loss (nats)", *result["loss"].values()],
                    *(
                        [f"{label}, mean |rise| (%)", *_mean_rise(result[key], features)]
                        for label, key in (("probed", "neurons"), ("random", "random"))
                        if result[key]
                    ),
                ],
            )
        ]
    if verb == "neuromfa":
        head = ["step", "α₀", "w", "E", "± networks", "E rescaled", "E shuffled", "E Gaussian"]
        head += ["R²", "kept nodes", "weight norm"]
        return [
            (
                head,
                [
                    [
                        f"{row['step']:,}" if row["step"] is not None else row["name"],
                        *(row.get(key) for key in ("alpha_0", "w", "E", "E_std")),
                        *(
                            row["controls"][name]["E"]
                            for name in ("rescaled", "shuffled", "gaussian")
                        ),
                        *(row.get(key) for key in ("fit_r2", "kept_nodes", "weight_norm")),
                    ]
                    for row in result["checkpoints"]
                ],
            )
        ]
    return []


def _mean_rise(rows: list[dict], features: list[str]) -> list[float]:
    return [sum(abs(row["increase_percent"][f]) for row in rows) / len(rows) for f in features]


def _table(head: list[str], rows: list[list]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>")
    return "".join(lines) + "</table>"


def _cell(value) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return html.escape(str(value))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{html.escape(path.stem)}' src='data:image/png;base64,{data}'>"


def _origin(provenance: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return (
        f"<p class='note'><code>{html.escape(provenance['command'])}</code><br>"
        f"{provenance['date']}, {html.escape(provenance['machine'])}; {html.escape(versions)}</p>"
    )
