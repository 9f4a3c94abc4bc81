"""MEmeL's three settings run; before late start the arms are one, behind it they differ."""

import json
import random

import memel
import memel_bert
import memel_convgru
import memel_swin
import pytest

from launch.comparison.statistics import over_seeds

FEW = {"BATCH": 4, "VALIDATION": 8, "IMAGES": 16, "SEQUENCES": 16}


def run(program, monkeypatch, folder, steps, *options):
    """Every arm's scores."""
    for name, value in FEW.items():
        monkeypatch.setattr(program, name, value, raising=False)
    file = folder / f"{steps}.json"
    words = ["program", "--seeds", "1", "--steps", str(steps), "--json", str(file), *options]
    monkeypatch.setattr("sys.argv", words)
    program.main()
    return json.loads(file.read_text())


def glue(folder):
    """Sentences whose label is whether a word is in them."""
    generator, file = random.Random(0), folder / "task.jsonl"
    lines = []
    for _ in range(40):
        words = generator.choices(["red", "green", "blue", "grey"], k=generator.randint(3, 9))
        lines.append(json.dumps({"sentence": " ".join(words), "label": int("red" in words)}))
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("program", [memel_bert, memel_swin, memel_convgru])
@pytest.mark.filterwarnings("error:l2e")
def test_arms_differ_from_late_start_on(program, monkeypatch, tmp_path, capsys):
    options = ["--data", str(glue(tmp_path))] if program is memel_bert else []
    found = {steps: run(program, monkeypatch, tmp_path, steps, *options) for steps in (10, 13)}
    arms = ["none", "naive (a)", "naive (b)", "MEmeL"]
    assert list(found[10]) == list(found[13]) == arms
    assert all(found[10][arm] == found[10]["none"] for arm in arms)
    assert len({json.dumps(found[13][arm]) for arm in arms}) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-4:]] == [f"| {arm}" for arm in arms]


def test_the_table_pairs_seeds():
    found = {"none": [{"loss": 1.0}, {"loss": 3.0}], "MEmeL": [{"loss": 1.1}, {"loss": 3.3}]}
    [*_, last] = memel.table(found).splitlines()
    assert last == f"| MEmeL | 2.2000 | {over_seeds([1.1 - 1.0, 3.3 - 3.0])} |"


def test_every_sample_comes_once_before_any_comes_again():
    order = [int(n) for numbers in memel.orders(7, 3, 14, seed=0) for n in numbers]
    assert all(sorted(order[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))
