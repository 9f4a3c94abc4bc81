"""Trajectories, JSON and the HTML page."""

import json
import re

import pytest

from l2e.analysis import Result, analyses
from l2e.analysis.ablation import best_of_each
from l2e.analysis.probing import Probe
from l2e.analysis.report import ReportSection, write_report
from l2e.analysis.results import finite
from l2e.analysis.trajectory import gather


def test_non_finite_numbers_become_null(tmp_path):
    result = Result(analyses()["fkr"], {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    text = result.to_json(tmp_path / "new")
    assert (tmp_path / "new" / "fkr.json").read_text() == text
    written = json.loads(text, parse_constant=pytest.fail)
    assert written["a"] == [None, 1.5]
    assert written["b"]["c"] is None
    assert set(written["provenance"]) == {"command", "date", "machine", "versions"}
    assert finite(("x", 2)) == ["x", 2]


def point(run, step, parameters, value):
    measures = {"K-S": value}
    name = f"{run}/step{step}"
    return {"name": name, "step": step, "parameters": parameters, "measures": measures}


def test_runs_of_one_size_are_seeds_of_one_band(tmp_path):
    points = [point("a", 0, 10, 0.4), point("b", 0, 10, 0.6), point("a", 5, 10, None)]
    points += [point("c", 0, 99, 0.1), point("b", 5, 10, 0.7)]
    values = gather(points)
    small, large = values["lines"]
    assert small["points"][0] == {"step": 0, "mean": 0.5, "low": 0.4, "high": 0.6, "seeds": 2}
    assert small["points"][1]["mean"] == 0.7
    assert small["points"][1]["seeds"] == 1
    assert large["points"] == [{"step": 0, "mean": 0.1, "low": 0.1, "high": 0.1, "seeds": 1}]
    result = Result(analyses()["trajectory"], values)
    assert result.plot(tmp_path)[0].name == "trajectory_0"
    assert 1000 < (tmp_path / "trajectory_0.png").stat().st_size < 20_000
    assert result.table().rows[0] == ["K-S", "1e-05 M parameters", "0", 0.5, "5", 0.7]


def test_neurons_to_ablate_are_the_best_of_each_feature_in_turn():
    rows = [("a", 1, 0.9), ("a", 2, 0.8), ("b", 3, 0.5), ("b", 1, 0.4), ("a", 4, 0.3)]
    probes = [Probe(0, n, f, s, 0, 0, 0) for f, n, s in rows]
    assert best_of_each(probes, 4) == [(0, 1), (0, 3), (0, 2), (0, 4)]


def variant(**values):
    return {"alpha_0": 1.0, "w": 0.4, "E": 0.1, "alpha": [1.2, 1.0], "f": [0.0, -0.1]} | values


def test_the_page_stands_alone_and_shows_missing_values(tmp_path):
    controls = {name: variant() for name in ("rescaled", "shuffled", "gaussian")}
    extra = {"mean_weighted_degree": 1.0, "weight_norm": 2.0, "controls": controls}
    rows = [
        {"name": "step0", "step": 0} | variant(E=0.0) | extra,
        {"name": "step1", "step": 1} | variant(E=None, reason="none") | extra,
    ]
    neuromfa = analyses()["neuromfa"]
    result = Result(neuromfa, {"checkpoints": rows})
    sections = [
        ReportSection(neuromfa, "here", result),
        ReportSection(neuromfa, "<there>", "a & b"),
    ]
    page = write_report(tmp_path / "r.html", "A & B", sections, "What is seen.")
    text = page.read_text()
    assert "A &amp; B" in text
    assert text.index("What is seen.") < text.index("<h2>")
    assert text.count("data:image/webp;base64,") == 4
    assert not re.search(r"(src|href)='(?!data:)", text)
    assert "<td>n/a</td>" in text
    assert "&lt;there&gt;</h2>\n<p>Not measured: a &amp; b</p>" in text
    assert "pytest" in text  # the command that made it


def test_an_estimated_ablation_says_how_far_off_it_can_be():
    row = {
        "neuron": "L0.N1",
        "increase_percent": {"a": 0.3},
        "increase_percent_stderr": {"a": 0.021},
    }
    values = {"how": "mean", "neurons": [row], "random": [], "loss": {"a": 2.0}}
    values |= {"exact_passages": 3, "first_order_correlation": 0.987}
    ablate = analyses()["ablate"]
    told = " ".join(ablate.notes(values))
    assert "3 passages of each feature were run exactly" in told
    assert "0.99" in told
    assert "0.021 percentage points" in told
    assert "exactly" not in " ".join(ablate.notes(values | {"exact_passages": None}))
    assert ablate.tables(values)[0].rows == [["a", 2.0, 0.3]]


def drawn_texts(panel):
    """All that a panel writes, as matplotlib draws it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from l2e.analysis.figures import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure()
        panel.draw(figure.subplots())
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


NAMES = ["$x_$", "a_{b", "_hidden", "{0}%s", "😀", "$\\frac$", "100 % & <b>"]


def test_names_of_features_are_drawn_as_they_are_written():
    """In every figure that shows them; a legend shows those that begin with _ as well."""
    scores = {"f1": 0.5, "mcc": 0.4, "precision": 0.5, "recall": 0.5}
    probe = {
        "always_yes_f1": dict.fromkeys(NAMES, 0.2),
        "permutation": {name: scores for name in NAMES},
        "sizes": [
            {"feature": name, "k": k, "layer": 0, **scores} for name in NAMES for k in (1, 2)
        ],
        "neurons": [{"feature": name, "layer": 0, "neuron": 1, **scores} for name in NAMES],
    }
    row = {"neuron": "L0.N1", "increase_percent": dict.fromkeys(NAMES, 0.3)}
    ablate = {"how": "mean", "neurons": [row], "random": [], "loss": dict.fromkeys(NAMES, 2.0)}
    shown = {"feature": NAMES[0], "ms": 1.0, "ms_others": 0.5}
    scale = {
        "layers": [{"layer": 0, "mean_ms": 1.0, "std_ms": 0.1, "neurons": 4, "ks": 0.2}],
        "top": [shown | {"feature": name} for name in NAMES],
        "random": [shown],
        "example": {
            "neuron": "L0.N1",
            "feature": NAMES[0],
            "kind": "pre_mean",
            "activations": {name: [0.0, 1.0, 2.0, 3.0, 4.0] for name in NAMES},
        },
    }
    for analysis, values, figures in (
        ("probe", probe, 2),
        ("ablate", ablate, 1),
        ("scale", scale, 2),
    ):
        panels = [panel for panel in analyses()[analysis].panels(values) if panel.words]
        assert len(panels) == figures
        for panel in panels:
            texts = drawn_texts(panel)
            assert set(NAMES) <= {text.get_text() for text in texts}, panel.name
            assert not any(text.get_parse_math() for text in texts), panel.name
            assert panel.png().startswith(b"\x89PNG")


def test_letters_that_no_font_has_are_told(capsys):
    from l2e.analysis.figures import families

    families.cache_clear()
    families("ab\U000f1234")
    families("ab\U000f1234")
    assert capsys.readouterr().out.count("U+F1234") == 1
    assert families("αβ") == ["DejaVu Sans"]
