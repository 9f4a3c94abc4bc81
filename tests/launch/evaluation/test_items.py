"""Items of local task files that cannot be scored are told by their file and line."""

import gzip
import json
import os

import pytest

from launch.evaluation import items, scores, tasks
from launch.evaluation.harness import HarnessModel
from tests.launch.models import write_sciq


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": None}, "line 5: field 'question' holds null"),
        (
            {"question": 5},
            "line 5: field 'question' is a whole number, and text in the",
        ),
        ({"correct_answer": ["a"]}, "line 5: field 'correct_answer' is a list"),
        (["a"], "line 5: a list, not a record"),
        (None, "line 5: null, not a record"),
    ],
)
def test_wrong_records_name_file_and_line(tmp_path, change, told):
    path = write_sciq(tmp_path)
    lines = path.read_text().splitlines()
    record = json.loads(lines[4]) | change if isinstance(change, dict) else change
    lines[4] = json.dumps(record)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"sciq_test\.jsonl, " + told):
        tasks.select(["sciq"], tmp_path)


@pytest.mark.parametrize("choices", [[], ["a", "", "c", "d"], ["a", None, "c", "d"]])
def test_choices_that_are_none_name_file_and_line(tmp_path, choices):
    rows = [
        {"id": str(i), "question": "q", "answerKey": "A",
         "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}}
        for i in range(3)
    ]  # fmt: skip
    rows[1]["choices"]["text"] = choices
    path = tmp_path / "arc_easy_test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"arc_easy_test\.jsonl, line 2: field 'choices'"):
        tasks.select(["arc_easy"], tmp_path)


PIQA = {"goal": "g", "sol1": "one way", "sol2": "another way", "label": 1}
ARC = {"id": "0", "question": "q", "answerKey": "A"}
LETTERS = ["A", "B", "C"]
ARC |= {"choices": {"text": ["a", "b", "c"], "label": LETTERS}}
WINOGRANDE = {"sentence": "the _ is big", "option1": "dog", "option2": "cat", "answer": "1"}
LOGIQA = {"label": "a", "context": "c", "question": "q", "options": ["w", "x", "y", "z"]}
HELLASWAG = {"ctx_a": "A", "ctx_b": "b", "activity_label": "c", "endings": ["x", "y"], "label": "1"}
SCIQ = {f"distractor{i}": f"no{i}" for i in (1, 2, 3)}
SCIQ |= {"question": "q", "correct_answer": "yes", "support": ""}


@pytest.mark.parametrize(
    ("name", "record", "change", "told"),
    [
        # What test sets have whose answers are kept secret; the harness would score it as wrong.
        ("piqa_validation", PIQA, {"label": -1}, "right answer, -1, is none of its 2 choices"),
        ("piqa_validation", PIQA, {"label": 2}, "right answer, 2, is none of its 2 choices"),
        ("piqa_validation", PIQA, {"sol1": " "}, "one of its choices is blank"),
        ("arc_easy_test", ARC, {"answerKey": "E"}, "right answer cannot be found"),
        ("arc_easy_test", ARC, {"answerKey": ""}, "right answer cannot be found"),
        ("arc_easy_test", ARC, {"choices": {"text": ["a", "b"], "label": LETTERS}}, "of [2, 3]"),
        ("arc_easy_test", ARC, {"choices": {"text": ["a"], "label": ["A"]}}, "one choice alone"),
        ("SCIQ_TEST", SCIQ, {"correct_answer": ""}, "one of its choices is blank"),
        ("lambada_openai_test", {"text": "in the end"}, {"text": "in the end "}, "answer is blank"),
        ("logiqa_test", LOGIQA, {"label": "e"}, "right answer cannot be found"),
        ("winogrande_validation", WINOGRANDE, {"answer": "3"}, "cannot be found ('3')"),
        ("winogrande_validation", WINOGRANDE, {"option1": " "}, "one of its choices is blank"),
        # The harness would bring all items to one form, and then the first would be at fault.
        ("piqa_validation", PIQA, {"label": 0.5}, "is a fraction, and a whole number in the"),
        ("arc_easy_test", ARC, {"choices": {}}, "is {}, and {label: a list of text, text: a"),
        ("arc_easy_test", ARC, {"choices": {"text": ["a", "b"]}}, "is {text: a list of text}"),
        # A task that makes its own fields of these.
        ("hellaswag_validation", HELLASWAG, {"label": "7"}, "right answer, 7, is none of its 2"),
        ("hellaswag_validation", HELLASWAG, {"label": "x"}, "cannot be read as an item"),
    ],
)
def test_an_item_without_a_right_answer_is_named(model, tmp_path, name, record, change, told):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (record, record, record | change)))
    task = name.lower().rpartition("_")[0]
    with pytest.raises(ValueError) as refused:
        scores.evaluate(HarnessModel(model), tasks.select([task], tmp_path))
    assert str(refused.value).startswith(f"{path}, line 3: ")
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("name", "record", "told"),
    [
        ("arc_easy_test", ARC | {"answerKey": "1"}, "right answer cannot be found"),
        ("arc_easy_test", ARC | {"choices": "abc"}, "right answer cannot be found"),
        ("arc_easy_test", ARC | {"choices": {"text": "ab", "label": "AB"}}, "choices cannot be"),
        ("arc_easy_test", ARC | {"choices": {"text": [1, 2], "label": LETTERS[:2]}}, "no texts"),
        ("logiqa_test", LOGIQA | {"options": ["x"], "label": "d"}, "cannot be read as an item"),
        ("winogrande_validation", WINOGRANDE | {"sentence": "no gap"}, "cannot be found"),
        ("winogrande_validation", WINOGRANDE | {"answer": "A"}, "cannot be found ('A')"),
        ("hellaswag_validation", HELLASWAG | {"label": "x"}, "'hellaswag' cannot read it"),
        ("piqa_validation", PIQA | {"goal": "\ud83d"}, "surrogates"),
    ],
)
def test_a_first_item_that_is_none_is_named(model, tmp_path, name, record, told):
    """The harness looks at it before any other, and says nothing of where it is."""
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError) as refused:
        scores.evaluate(HarnessModel(model), tasks.select([name.rpartition("_")[0]], tmp_path))
    assert str(refused.value).startswith(f"{path}, line 1: ")
    assert told in str(refused.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "sciq_test.jsonl")
    with pytest.raises(ValueError, match=r"sciq_test\.jsonl: is no regular file"):
        tasks.select(["sciq"], tmp_path)


def test_a_field_given_twice_is_named(tmp_path):
    line = json.dumps(PIQA).replace('"label": 1', '"label": 1, "label": 0')
    (tmp_path / "piqa_validation.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"line 1: .*'label' is there twice"):
        tasks.select(["piqa"], tmp_path)


def test_no_item_is_its_own_example(model, tmp_path, monkeypatch):
    """Of a file of scored items alone, the others are shown before each."""
    write_sciq(tmp_path, items=4)
    asked: list[str] = []

    def likelihoods(self, requests, disable_tqdm=False):
        asked.extend(request.args[0] for request in requests)
        return [(-1.0, False) for _ in requests]

    monkeypatch.setattr(HarnessModel, "loglikelihood", likelihoods)
    scores.evaluate(HarnessModel(model), tasks.select(["sciq"], tmp_path), shots=3)
    for number in range(4):
        question = f"What is thing number {number}?"
        assert [prompt.count(question) for prompt in asked] == [1] * 16
    with pytest.raises(ValueError, match="sciq: 4 examples before each item need more than 4 rec"):
        scores.evaluate(HarnessModel(model), tasks.select(["sciq"], tmp_path), shots=4)


def test_an_example_without_a_right_answer_is_named(model, tmp_path):
    """Python would take the last choice for -1."""
    (tmp_path / "piqa_validation.jsonl").write_text(json.dumps(PIQA) + "\n")
    train = tmp_path / "piqa_train.jsonl"
    train.write_text("".join(json.dumps(PIQA | {"label": i}) + "\n" for i in (0, 1, -1)))
    with pytest.raises(ValueError, match=rf"{train}, line 3: its right answer, -1"):
        scores.evaluate(HarnessModel(model), tasks.select(["piqa"], tmp_path), shots=2)


def test_labels_of_another_kind_are_named(model, tmp_path):
    rows = [json.dumps(PIQA | {"label": str(i)}) for i in (0, 1)]
    (tmp_path / "piqa_validation.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="line 1: its right answer, '0', is none of its 2"):
        scores.evaluate(HarnessModel(model), tasks.select(["piqa"], tmp_path))


def test_two_files_of_the_same_items_are_refused(tmp_path):
    write_sciq(tmp_path).with_name("sciq_test_subset500.jsonl").write_text(json.dumps(SCIQ))
    with pytest.raises(ValueError, match=r"sciq_test\.jsonl and .*both hold the test items"):
        tasks.select(["sciq"], tmp_path)


@pytest.mark.parametrize("hurt", [lambda data: data[:-20], lambda data: data + bytes(512)])
def test_a_hurt_gz_names_the_file(tmp_path, hurt):
    data = gzip.compress(write_sciq(tmp_path).read_bytes())
    (tmp_path / "sciq_test.jsonl").unlink()
    (tmp_path / "sciq_test.jsonl.gz").write_bytes(hurt(data))
    with pytest.raises(ValueError, match=r"sciq_test\.jsonl\.gz, after line \d+: cannot be read"):
        tasks.select(["sciq"], tmp_path)


def test_benchmark_file_with_missing_fields(task_data, tmp_path):
    rows = [json.loads(line) for line in (task_data / "sciq_test.jsonl").read_text().splitlines()]

    def select(rows: list[dict]) -> str:
        with gzip.open(tmp_path / "sciq_test.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        items.read_items.cache_clear()
        with pytest.raises(ValueError) as caught:
            tasks.select(["sciq"], tmp_path)
        return str(caught.value)

    without = [{k: v for k, v in row.items() if k != "distractor2"} for row in rows]
    assert "distractor2" in select(without)
    broken = [*rows[:4], {k: v for k, v in rows[4].items() if k != "support"}, *rows[5:]]
    assert "line 5" in select(broken)
    assert "'support' is missing" in select(broken)
    assert "holds no records" in select([])
