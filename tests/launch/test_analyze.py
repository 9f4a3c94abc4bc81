"""launch/analyze.py end to end on a small model in Hugging Face form."""

import dataclasses
import json

import pytest

from l2e.analysis import analyses
from launch import analyze
from tests.l2e.analysis.conftest import save_model, write_letters
from tests.launch.running import refused, succeeds


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, three checkpoints and a feature file."""
    folder = tmp_path_factory.mktemp("analyze")
    save_model(folder / "step0")
    save_model(folder / "step5", factor=1.5)
    write_letters(folder / "letters.jsonl.gz")
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


def test_report_is_all_of_it_in_one_page(place):
    """Every analysis of the list; files of one name keep their results apart."""
    out = place / "report"
    other = place / "other" / "letters.jsonl"
    other.parent.mkdir()
    write_letters(other, features=(2, 3))
    features = [str(place / "letters.jsonl.gz"), str(other)]
    command = ["report", "--model", str(place / "step5"), "--features", *features]
    command += ["--checkpoints", str(place / "step0"), str(place / "step5"), "--networks", "1"]
    command += ["--batches", "1", "--max-tokens", "16"]
    analyze.main([*command, "--random", "2", "--output", str(out)])
    page = (out / "report.html").read_text()
    for analysis in analyses().values():
        alone = {*analysis.on, *analysis.optional} == {"checkpoints"}
        for where in ["report"] if alone else ["letters", "letters-2"]:
            assert f"<h2>{analysis.title}: {where}</h2>" in page
            folder = out if where == "report" else out / where
            assert (folder / f"{analysis.name}.json").is_file()
    assert f"<h1>{place / 'step5'}</h1>" in page
    assert "letters: 24 passages of 2 features. letters-2: 24 passages of 2 features." in page
    assert page.count("<code>") == 1, "the command is told once"
    first, second = (
        json.loads((out / name / "ablate.json").read_text())["loss"]
        for name in ("letters", "letters-2")
    )
    assert set(first) == {"f0", "f1"}
    assert set(second) == {"f2", "f3"}
    with pytest.raises(ValueError, match="named twice"):
        analyze.main(
            ["report", "--model", "x", "--features", *features, features[0], "--output", "x"]
        )


def test_a_report_tells_what_could_not_be_measured(place, capsys):
    out = place / "partly"
    command = ["report", "--model", str(place / "step5"), "--random", "0", "--output", str(out)]
    analyze.main([*command, "--features", str(place / "letters.jsonl.gz")])
    page = (out / "report.html").read_text()
    assert "Not measured: no --checkpoints were named" in page
    assert "Not measured: letters: " in page  # too little text for decrease's batches of 128
    assert "ask for fewer batches" in capsys.readouterr().err
    assert not (out / "letters" / "decrease.json").exists()


def test_a_users_mistake_ends_with_status_2_and_its_message_alone(place):
    command = ["launch/analyze.py", "fkr", "--model", place / "nothing"]
    command += ["--features", place / "letters.jsonl.gz", "--output", place / "bad"]
    assert "no model with tokenizer could be loaded" in refused(*command)


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
    path = write_letters(tmp_path / "few.jsonl", passages=4)
    command = ["probe", "--model", str(place / "step5"), "--features", str(path)]
    with pytest.raises(ValueError, match="at least 10 passages"):
        analyze.main([*command, "--output", str(tmp_path)])


def test_decrease_writes_its_contract(place):
    result = run(place, "decrease", "--layers", "0,1", "--batches", "1", "--max-tokens", "4")
    assert result["layers"] == ["0", "1"]
    assert list(result["arms"]) == ["original", "naive a", "naive b", "reversed"]
    assert (place / "out" / "decrease.png").is_file()


OUT_OF_BOUNDS = [
    *("scale --passages 0", "scale --skip -1", "fkr --max-tokens 0", "scale --top -1"),
    *("ablate --random -1", "ablate --exact 1", "ablate --scored 0", "ablate --ablate-passages 0"),
    *("decrease --topk 0", "decrease --batches 0", "decrease --learning-rate -0.1"),
    *("decrease --learning-rate nan", "decrease --learning-rate inf"),
    *("neuromfa --networks 0", "neuromfa --sample 0", "neuromfa --threshold 1"),
    *("neuromfa --hops 0", "trajectory --hops -3", "report --networks 1.5"),
]


@pytest.mark.parametrize("case", OUT_OF_BOUNDS)
def test_numbers_out_of_bounds_are_named(case, capsys):
    verb, option, value = case.split()
    with pytest.raises(SystemExit) as ended:
        analyze.parse([verb, option, value])
    assert ended.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


def test_every_option_of_a_number_has_bounds_here_and_in_a_notebook():
    """None is left to be found out by a traceback."""
    for analysis in analyses().values():
        for one in dataclasses.fields(analysis.options):
            if one.metadata["of"] in (int, float):
                least = one.metadata["least"]
                assert least is not None, f"{analysis.name}: {one.name}"
                with pytest.raises(ValueError, match=f"{one.name} .* at least"):
                    analysis.options(**{one.name: least - 1})


@pytest.mark.parametrize("verb", [*analyses(), "report"])
def test_help_does_not_wait_for_torch(verb):
    done = succeeds("-X", "importtime", "launch/analyze.py", verb, "--help")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not imported & {"torch", "transformers", "scipy", "sklearn", "matplotlib"}


def test_a_series_is_refused_before_it_is_measured(place):
    features = ["--features", str(place / "letters.jsonl.gz"), "--output", str(place / "no")]
    for named, told in (("step5", "same step"), ("other", "no step in the name of")):
        series = ["--checkpoints", str(place / "step5"), str(place / named)]
        for verb in ("neuromfa", "trajectory"):
            more = features if verb == "trajectory" else features[2:]
            with pytest.raises(ValueError, match=told):
                analyze.main([verb, *series, *more])
    assert not (place / "no").exists()


def test_neurons_that_probe_best_are_ablated_where_none_are_named(place):
    found = run(place, "ablate", "--random", "0")
    best = {row["feature"]: row for row in reversed(run(place, "probe")["neurons"])}
    neurons = {f"L{row['layer']}.N{row['neuron']}" for row in best.values()}
    assert neurons <= {row["neuron"] for row in found["neurons"]}
    assert len(found["neurons"]) == 10
