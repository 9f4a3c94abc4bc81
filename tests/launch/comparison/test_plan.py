"""Experiments' plans: whatever is wrong with one is told before the first run."""

import json
from pathlib import Path

import pytest

from launch.comparison import plan
from tests.launch.running import ROOT

TINY = ROOT / "configs" / "experiments" / "tiny.json"


def build(raw: dict, folder: Path, **options) -> plan.Experiment:
    return plan.build(raw, folder / "plan.json", folder / "out", **options)


def test_every_mistake_is_told_at_once_before_the_first_run(raw, tmp_path):
    raw["seeds"] = [1, 2, 2]
    raw["arms"][1] = {"name": "none", "overrides": {"train.seed": 3}, "seeds": 9}
    raw["primary"]["against"] = "nothing"
    with pytest.raises(ValueError) as caught:
        build(raw, tmp_path)
    for told in ("2 is named 2 times", "names 2 arms", "no arm 'nothing'", "9 seeds", "train.seed"):
        assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arms": 3}, "arms: input should be a valid list"),
        ({"weeds": [1]}, "weeds: unknown key"),
        ({"smallest_difference": 0}, "smallest_difference: input should be greater than 0"),
        ({"base": "nowhere.json"}, "no such file"),
        ({"readouts": ["std, block 4"]}, "there is no block 4; they are 0 to 3"),
        ({"program": "nowhere.py"}, "nowhere.py: no such Python file"),
        ({"overrides": {"l2e.wieght": 1}}, "did you mean l2e.weight"),
    ],
)
def test_what_is_wrong_with_a_plan(raw, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        build(raw | change, tmp_path)


@pytest.mark.parametrize("seeds", [[1, 2**32], [1, 2, -3], [1, 2.0], [True, 2]])
def test_every_seed_is_checked_not_the_first_alone(raw, tmp_path, seeds):
    with pytest.raises(ValueError, match=r"seeds\.\d: input should be"):
        build(raw | {"seeds": seeds}, tmp_path)


@pytest.mark.parametrize(
    "content",
    ['{"seeds": [1], "seeds": [2]}', '{"arms": [{"name": "a", "name": "b"}]}', "[" * 10**5, "\0"],
)
def test_plans_that_would_be_read_as_another(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="not readable as a plan"):
        plan.read(tmp_path / "plan.json", tmp_path / "out")


@pytest.mark.parametrize(
    "keys",
    [
        {"l2e.method": "none", "logging.interval": 7},
        {"l2e.method": "none", "l2e.weight": 0.5, "l2e.selection": "topk"},
        {"l2e.method": "none", "data.cache_dir": "elsewhere", "checkpoint.keep_last": 3},
        {"l2e.method": "silence", "l2e.inhibit_fraction": 0.3, "l2e.layers": [1, 2]},
        {"l2e.method": "regularize", "l2e.weight": 0},
        {"l2e.method": "deactivate", "l2e.weight": 1.0},
        {"l2e.method": "deactivate", "schedule.decay_steps": 60},
    ],
)
def test_arms_that_differ_in_what_changes_nothing(raw, tmp_path, keys):
    raw["arms"].append({"name": "deactivate", "overrides": {"l2e.method": "deactivate"}})
    raw["arms"].append({"name": "again", "overrides": keys})
    told = "arms '.*' and 'again' train the same: nothing of that depends on "
    with pytest.raises(ValueError, match=told) as caught:
        build(raw, tmp_path)
    assert list(keys)[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"l2e.weight": 0.5}, None),
        ({"data.order": "megatron"}, None),
        ({"train.stop_after": 30}, r"arm again: train\.stop_after leaves runs unfinished"),
        ({"tokenizer.vocab_size": 1024}, "arm again: other data.path or tokenizer than none's"),
        ({"parallel.tensor": 2}, "1 processes are no multiple of 2"),
    ],
)
def test_what_an_arm_may_override(raw, tmp_path, keys, told):
    raw["arms"].append({"name": "again", "overrides": {"l2e.method": "regularize"} | keys})
    if told is None:
        assert len(build(raw, tmp_path).runs) == 9
        return
    with pytest.raises(ValueError, match=told):
        build(raw, tmp_path)


@pytest.mark.parametrize("names", [("none", "NONE"), ("none", "none"), ("a" * 101, "none")])
def test_names_that_no_two_folders_have(raw, tmp_path, names):
    for arm, name in zip(raw["arms"], names, strict=True):
        arm["name"] = name
    with pytest.raises(ValueError, match=r"names 2 arms|at most 100 characters"):
        build(raw, tmp_path)


def test_arms_alike_and_missing_controls(raw, tmp_path):
    raw["arms"].append({"name": "again", "overrides": {"l2e.method": "none"}})
    with pytest.raises(ValueError, match="'none' and 'again' are the same configuration"):
        build(raw, tmp_path)
    raw["arms"][1:] = [{"name": "l2e", "overrides": {"l2e.method": "regularize"}}]
    raw["primary"]["arm"] = "l2e"
    with pytest.raises(ValueError, match=r"'silence'.*--no-control"):
        build(raw, tmp_path)
    assert len(build(raw, tmp_path, control=False).runs) == 6


def test_k_of_the_least_fkr(raw, tmp_path):
    raw["inhibit_fraction_from"] = "fkr.json"
    curve = [{"k": k, "fkr": fkr} for k, fkr in ((0.001, 0.5), (0.03, 0.2), (0.2, 0.6))]
    with pytest.raises(ValueError, match=r"no result of `analyze\.py fkr`"):
        build(raw, tmp_path)
    (tmp_path / "fkr.json").write_text(json.dumps({"curve": curve}))
    assert build(raw, tmp_path).runs[0].config.l2e.inhibit_fraction == 0.03
    (tmp_path / "fkr.json").write_text(json.dumps({"curve": curve[1:]}))
    with pytest.raises(ValueError, match=r"no minimum .* k = 3\.00%"):
        build(raw, tmp_path)
    raw["overrides"]["l2e.inhibit_fraction"] = 0.01
    with pytest.raises(ValueError, match="no minimum"):
        build(raw, tmp_path)


def test_arms_of_most_seeds_come_first_and_then_seed_by_seed(raw, tmp_path):
    raw["arms"].insert(0, {"name": "l2e", "overrides": {"l2e.method": "regularize"}, "seeds": 1})
    order = [(run.arm, run.seed) for run in build(raw, tmp_path).runs]
    pairs = [(arm, seed) for seed in (1, 2, 3) for arm in ("none", "silence")]
    assert order == [*pairs, ("l2e", 1)]


def test_readouts_that_no_run_would_tell(raw, tmp_path):
    raw["primary"]["readout"] = "validation_lass"
    raw["readouts"] = ["ks", "sciq 0-shot", "std, block 1", "worth, block 1"]
    raw["overrides"]["evaluate.layer_worth"] = False
    with pytest.raises(ValueError) as caught:
        build(raw, tmp_path)
    assert "4 errors" in str(caught.value)
    for told in ("lass: unknown; there are validation_loss,", "ks: set monitor.features to"):
        assert told in str(caught.value)
    for told in ("sciq 0-shot: set evaluate.tasks", "worth, block 1: set evaluate.layer_worth"):
        assert told in str(caught.value)


def test_what_all_arms_share_is_told_once(raw, tmp_path, caplog):
    raw["arms"].append({"name": "more", "overrides": {"l2e.weight": -1}})
    raw["overrides"] |= {"model.hidden_size": 63, "schedule.warmup_steps": 100}
    with pytest.raises(ValueError) as caught:
        build(raw, tmp_path)
    assert "2 errors" in str(caught.value)
    assert str(caught.value).count("num_attention_heads") == 1
    assert "all arms: model.num_attention_heads" in str(caught.value)
    assert "arm more: l2e.weight = -1" in str(caught.value)
    raw["overrides"]["model.hidden_size"] = 64
    del raw["arms"][-1]
    caplog.clear()
    build(raw, tmp_path)
    assert caplog.text.count("schedule.warmup_steps") == 1
