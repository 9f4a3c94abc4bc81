"""launch/analyze.py end to end on a small model in Hugging Face form."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import analyze
from tests.l2e.analysis.conftest import byte_tokenizer, letters, make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, three checkpoints and a feature file."""
    folder = tmp_path_factory.mktemp("analyze")
    for number, step in enumerate(["step0", "step5"]):
        model = make_model("gpt_neox", layers=2, hidden=128)
        for parameter in model.parameters():
            parameter.data.mul_(1 + number / 2)
        model.save_pretrained(folder / step)
        byte_tokenizer().save_pretrained(folder / step)
    rows = [{"text": letters(f, i), "feature": f"f{f}"} for i in range(12) for f in range(2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "letters.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def run(place, verb, *more):
    output = place / "out"
    common = ["--model", str(place / "step5"), "--features", str(place / "letters.jsonl.gz")]
    analyze.main([verb, *common, "--output", str(output), *more])
    return json.loads((output / f"{verb}.json").read_text())


def test_scale_and_fkr_write_their_contract_from_one_pass(place, capsys):
    scale = run(place, "scale")
    assert {"layers", "ks", "top", "random"} <= set(scale)
    assert [row["layer"] for row in scale["layers"]] == [0, 1]
    assert scale["features"]["passages"] == {"f0": 12, "f1": 12}
    assert (place / "out" / "scale_layers.png").is_file()
    fkr = run(place, "fkr")
    assert "activations found in" in capsys.readouterr().out
    assert any(point["k"] == 0.02 and 0 <= point["fkr"] <= 1 for point in fkr["curve"])
    assert [row["layer"] for row in fkr["layers"]] == [0, 1]


def test_probe_and_proxies_write_their_contract(place):
    probe = run(place, "probe")
    best = probe["neurons"][0]
    assert {"layer", "neuron", "feature", "f1", "mcc", "precision", "recall"} == set(best)
    assert best["f1"] == max(row["f1"] for row in probe["neurons"])
    assert set(probe["always_yes_f1"]) == {"f0", "f1"}
    assert len(run(place, "proxies")["layers"]) == 2


def test_ablate_writes_its_contract(place):
    found = run(place, "ablate", "--neurons", "L0.N3,L1.N9", "--random", "4")
    assert [row["neuron"] for row in found["neurons"]] == ["L0.N3", "L1.N9"]
    assert set(found["neurons"][0]["increase_percent"]) == {"f0", "f1"}
    assert len(found["random"]) == 4


def test_neuromfa_and_trajectory_write_their_contract(place):
    out = place / "out"
    checkpoints = [str(place / "step5"), str(place / "step0")]
    analyze.main(["neuromfa", "--checkpoints", *checkpoints, "--output", str(out)])
    rows = json.loads((out / "neuromfa.json").read_text())["checkpoints"]
    assert [row["step"] for row in rows] == [0, 5]
    keys = {"name", "alpha_0", "w", "E", "controls", "mean_weighted_degree", "weight_norm"}
    assert keys <= set(rows[1])
    assert set(rows[1]["controls"]) == {"rescaled", "shuffled", "gaussian"}
    # the second checkpoint is the first times 1.5: rescaled it is the first again
    assert rows[1]["controls"]["rescaled"]["E"] == pytest.approx(0, abs=1e-6)
    features = ["--features", str(place / "letters.jsonl.gz")]
    measures = ["--measures", "fkr", "neuromfa"]
    command = ["trajectory", "--checkpoints", *checkpoints, *features, *measures]
    analyze.main([*command, "--output", str(out)])
    lines = json.loads((out / "trajectory.json").read_text())["lines"]
    by_measure = {line["measure"]: line for line in lines}
    assert [p["step"] for p in by_measure["FKR at k = 2 %"]["points"]] == [0, 5]
    assert by_measure["E"]["points"][1]["mean"] == pytest.approx(rows[1]["E"])


def test_report_is_one_page(place):
    out = place / "report"
    features = str(place / "letters.jsonl.gz")
    command = ["report", "--model", str(place / "step5"), "--features", features]
    command += ["--checkpoints", str(place / "step0"), str(place / "step5")]
    analyze.main([*command, "--random", "2", "--output", str(out)])
    page = (out / "report.html").read_text()
    for title in (
        "Monosemantic Scale",
        "False Killing",
        "Sparse",
        "Ablation",
        "Proxies",
        "NeuroMFA",
    ):
        assert title in page
    assert f"<h1>{place / 'step5'}</h1>" in page
    assert "letters: 24 passages of 2 features." in page
    assert page.count("<code>") == 1, "the command is told once"
    assert (out / "letters" / "fkr.json").is_file()
    assert (out / "neuromfa.json").is_file()


def test_a_users_mistake_ends_with_status_2_and_its_message_alone(place):
    command = [sys.executable, "launch/analyze.py", "fkr", "--model", str(place / "nothing")]
    command += ["--features", str(place / "letters.jsonl.gz"), "--output", str(place / "bad")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no model with tokenizer could be loaded" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_checkpoint_of_the_trainer_gives_what_its_hugging_face_form_gives(place):
    from launch.checkpoint.huggingface import from_huggingface

    checkpoint = place / "run" / "checkpoints" / "step_0000007"
    checkpoint.parent.mkdir(parents=True)
    from_huggingface(str(place / "step5"), checkpoint)
    output = place / "ours"
    command = ["--features", str(place / "letters.jsonl.gz"), "--output", str(output)]
    analyze.main(["fkr", "--model", str(checkpoint), *command])
    ours = json.loads((output / "fkr.json").read_text())
    assert ours["curve"] == run(place, "fkr")["curve"]
    checkpoints = ["--checkpoints", str(place / "step0"), str(checkpoint)]
    analyze.main(["neuromfa", *checkpoints, "--output", str(output)])
    rows = json.loads((output / "neuromfa.json").read_text())["checkpoints"]
    assert [row["step"] for row in rows] == [0, 7]
    assert rows[1]["E"] > 0


def test_too_few_passages_are_named(place, tmp_path):
    path = tmp_path / "few.jsonl"
    rows = [{"text": letters(f, i), "feature": f"f{f}"} for i in range(4) for f in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["probe", "--model", str(place / "step5"), "--features", str(path)]
    with pytest.raises(ValueError, match="at least 10 passages"):
        analyze.main([*command, "--output", str(tmp_path)])


def test_decrease_writes_its_contract(place):
    result = run(place, "decrease", "--layers", "0,1", "--batches", "1", "--max-tokens", "4")
    assert result["layers"] == ["0", "1"]
    assert list(result["arms"]) == ["original", "naive a", "naive b", "reversed"]
    assert (place / "out" / "decrease.png").is_file()
