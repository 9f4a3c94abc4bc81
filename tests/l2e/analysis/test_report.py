"""Trajectories, JSON and the HTML page."""

import json
import re

import pytest

from l2e.analysis.figures import draw_neuromfa, draw_trajectory
from l2e.analysis.report import _notes, top_neurons, write_report
from l2e.analysis.results import finite, read_result, write_result
from l2e.analysis.trajectory import gather, run_of


def test_non_finite_numbers_become_null(tmp_path):
    path = write_result(tmp_path, "x", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["a"] == [None, 1.5]
    assert written["b"]["c"] is None
    assert set(written["provenance"]) == {"command", "date", "machine", "versions"}
    assert finite(("x", 2)) == ["x", 2]
    assert read_result(tmp_path, "none") is None


def point(run, step, parameters, value):
    measures = {"K-S": value}
    name = f"{run}/step{step}"
    return {"name": name, "step": step, "parameters": parameters, "measures": measures}


def test_runs_of_one_size_are_seeds_of_one_band(tmp_path):
    points = [point("a", 0, 10, 0.4), point("b", 0, 10, 0.6), point("a", 5, 10, None)]
    points += [point("c", 0, 99, 0.1), point("b", 5, 10, 0.7)]
    result = gather(points)
    small, large = result["lines"]
    assert small["points"][0] == {"step": 0, "mean": 0.5, "low": 0.4, "high": 0.6, "seeds": 2}
    assert small["points"][1]["mean"] == 0.7
    assert small["points"][1]["seeds"] == 1
    assert large["points"] == [{"step": 0, "mean": 0.1, "low": 0.1, "high": 0.1, "seeds": 1}]
    assert draw_trajectory(result, tmp_path)[0].stat().st_size > 1000


def test_a_checkpoint_without_a_step_is_refused():
    with pytest.raises(ValueError, match="no step in the name of final"):
        gather([{"name": "final", "step": None, "parameters": 1, "measures": {}}])


def test_runs_are_told_by_folder_or_id():
    assert run_of("runs/a/checkpoints/step_0000010") == "runs/a/checkpoints"
    assert run_of("EleutherAI/pythia-70m@step10") == "EleutherAI/pythia-70m"


def test_neurons_to_ablate_are_the_best_of_each_feature_in_turn():
    rows = [("a", 1, 0.9), ("a", 2, 0.8), ("b", 3, 0.5), ("b", 1, 0.4), ("a", 4, 0.3)]
    neurons = [{"feature": f, "layer": 0, "neuron": n, "f1": s} for f, n, s in rows]
    assert top_neurons({"neurons": neurons}, 4) == ["L0.N1", "L0.N3", "L0.N2", "L0.N4"]


def variant(**values):
    return {"alpha_0": 1.0, "w": 0.4, "E": 0.1, "alpha": [1.2, 1.0], "f": [0.0, -0.1]} | values


def test_the_page_stands_alone_and_shows_missing_values(tmp_path):
    controls = {name: variant() for name in ("rescaled", "shuffled", "gaussian")}
    extra = {"mean_weighted_degree": 1.0, "weight_norm": 2.0, "controls": controls}
    rows = [
        {"name": "step0", "step": 0} | variant(E=0.0) | extra,
        {"name": "step1", "step": 1} | variant(E=None, reason="none") | extra,
    ]
    write_result(tmp_path, "neuromfa", {"checkpoints": rows})
    result = read_result(tmp_path, "neuromfa")
    images = draw_neuromfa(result, tmp_path)
    assert len(images) == 4
    page = write_report(tmp_path / "r.html", "A & B", [("here", "neuromfa", result, images)])
    text = page.read_text()
    assert "A &amp; B" in text
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)='(?!data:)", text)
    assert "<td>n/a</td>" in text
    assert "pytest" in text  # the command that made it


def test_an_estimated_ablation_says_how_far_off_it_can_be():
    row = {
        "neuron": "L0.N1",
        "increase_percent": {"a": 0.3},
        "increase_percent_stderr": {"a": 0.021},
    }
    result = {"how": "mean", "neurons": [row], "random": [], "loss": {"a": 2.0}}
    result |= {"exact_passages": 3, "first_order_correlation": 0.987}
    told = " ".join(_notes("ablate", result))
    assert "3 passages of each feature were run exactly" in told
    assert "0.99" in told
    assert "0.021 percentage points" in told
    assert "exactly" not in " ".join(_notes("ablate", result | {"exact_passages": None}))
