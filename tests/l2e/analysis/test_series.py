"""Which step a checkpoint is of, and which series are refused before anything is measured."""

import pytest

from l2e.analysis.series import named_step, read_series, run_of


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("EleutherAI/pythia-70m@step512", 512),
        ("runs/x/checkpoints/step_0000100", 100),
        ("runs/x/checkpoints/step_0000100/", 100),
        ("out/checkpoint-500", 500),
        ("step5_run/checkpoint-500", 500),
        ("models/global_step3000", 3000),
        ("models/iter_0005000", 5000),
        ("lightning/epoch=1-step=1200", 1200),
        ("me/model@run-2-step-7", 7),
        ("runs/step3/final", None),
        ("step7/model@main", None),
        ("model-70m", None),
    ],
)
def test_the_last_part_of_a_name_gives_the_step(name, step):
    assert named_step(name) == step


def test_runs_are_told_by_folder_or_id(tmp_path):
    assert run_of("runs/a/checkpoints/step_0000010") == "runs/a/checkpoints"
    assert run_of("EleutherAI/pythia-70m@step10") == "EleutherAI/pythia-70m"
    assert run_of("runs/a") == "runs/a"
    at = tmp_path / "x@y" / "step3"
    at.mkdir(parents=True)
    assert run_of(str(at)) == str(tmp_path / "x@y")


def test_missing_and_equal_steps_are_refused_before_anything_is_opened():
    def never(source):
        raise AssertionError(f"{source} was opened")

    with pytest.raises(ValueError, match=r"a/step1 and a/checkpoint-1 are the same step.*1"):
        read_series(["a/step0", "a/step1", "a/checkpoint-1"], never)
    with pytest.raises(ValueError, match=r"a/step1 and a/step1 are"):
        read_series(["a/step1", "a/step1"], never)
    with pytest.raises(ValueError, match="no step in the name of a/final"):
        read_series(["a/step0", "a/final"])


def test_seeds_share_steps_and_a_runs_folder_has_that_of_its_newest_checkpoint():
    newest = {"a": "exported/a-12/step_0000009", "b": "exported/b-34/step_0000009"}
    found = read_series(["a", "b", "c/step9"], lambda source: newest.get(source, source))
    assert [(one.name, one.step, one.run) for one in found] == [
        ("a", 9, "a"),
        ("b", 9, "b"),
        ("c/step9", 9, "c"),
    ]
    assert found[0].source == newest["a"]
    assert read_series(["final"])[0].step is None
