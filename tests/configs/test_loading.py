"""Reading configurations: defaults, overrides, and every mistake reported at once."""

import json
from pathlib import Path

import pytest

import configs
from configs.loading import keys

SMALL = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
    "data": {"path": "builtin", "sequence_length": 128},
    "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
}
SHIPPED = sorted(Path(configs.__file__).parent.glob("*.json"))


def write(folder: Path, content: dict) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


def mistakes(folder: Path, content: dict, *overrides: str, processes: int = 1) -> dict[str, str]:
    """The keys that a configuration's report complains about, with the lines."""
    with pytest.raises(configs.ConfigError) as report:
        configs.load(write(folder, content), overrides, processes)
    return {problem.key: str(problem) for problem in report.value.problems}


def test_overrides_are_json_where_they_parse(tmp_path: Path) -> None:
    settings = ("train.steps=7", "l2e.layers=[0, 1]", "l2e.method=none", "optimizer.eps=1e-6")
    config = configs.load(write(tmp_path, SMALL), settings)
    assert config.train.steps == 7
    assert config.l2e.layers == [0, 1]
    assert config.l2e.method == "none"
    assert config.optimizer.eps == 1e-6


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    content = SMALL | {
        "train": {"stepz": 10, "global_batch_size": 7, "micro_batch_size": 2},
        "optimizer": {"learning_rate": "fast"},
        "parallel": {"tensor": 3},
        "deepspeed": {"zero_optimization": {"stage": 7}, "train_batch_size": 3},
    }
    found = mistakes(tmp_path, content, processes=3)
    assert set(found) == {
        "train.stepz",
        "optimizer.learning_rate",
        "parallel.tensor",
        "train.global_batch_size",
        "deepspeed.zero_optimization.stage",
        "deepspeed.train_batch_size",
    }
    assert "did you mean train.steps?" in found["train.stepz"]
    assert "'fast'" in found["optimizer.learning_rate"]


@pytest.mark.parametrize(
    ("change", "key", "told"),
    [
        ({"model": {"preset": "71m"}}, "model", "70m"),
        ({"model": {"num_layers": 4}}, "model.hidden_size", "missing"),
        ({"model": SMALL["model"] | {"num_attention_heads": 5}}, "model.num_attention_heads", "64"),
        ({"l2e": {"inhibit_fraction": 2}}, "l2e.inhibit_fraction", "less than 1"),
        ({"l2e": {"layers": [9]}}, "l2e.layers", "0 to 3"),
        ({"l2e": {"layers": "middle"}}, "l2e.layers", "mid2"),
        ({"l2e": {"scale_invariant": True, "method": "none"}}, "l2e.scale_invariant", "L_MS"),
        ({"parallel": {"sequence": True}}, "parallel.sequence", "tensor"),
        ({"parallel": {"pipeline": 9}}, "parallel.pipeline", "4 blocks"),
        ({"data": {"path": "builtin", "sequence_length": 4096}}, "data.sequence_length", "2048"),
        ({"data": {}}, "data.path", "no corpus"),
        ({"data": {"path": "nowhere/corpus", "sequence_length": 128}}, "data.path", "nowhere"),
        ({"deepspeed": {"zero_optimization": 2}}, "deepspeed.zero_optimization", "section"),
        ({"nonsense": {}}, "nonsense", "unknown key"),
    ],
)
def test_each_mistake_names_its_key(tmp_path: Path, change: dict, key: str, told: str) -> None:
    found = mistakes(tmp_path, SMALL | change)
    assert key in found, found
    assert told in found[key]


def test_mistakes_of_the_methods_section_are_told_beside_all_others(tmp_path: Path) -> None:
    section = {"inhibit_fraction": 2, "layers": [9], "weigth": 0.1}
    found = mistakes(tmp_path, SMALL | {"l2e": section, "train": SMALL["train"] | {"stepz": 1}})
    assert set(found) == {"l2e.inhibit_fraction", "l2e.layers", "l2e.weigth", "train.stepz"}
    assert "did you mean l2e.weight?" in found["l2e.weigth"]
    lonely = mistakes(tmp_path, SMALL | {"l2e": {"threshold_rate": 0.01}})
    assert list(lonely) == ["l2e.threshold_rate_floor"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"data": {"corpus": "builtin"}}, "data.path = 'builtin'"),
        ({"l2e": {"monitor": __file__}}, f"monitor.features = {__file__!r}"),
        ({"l2e": {"monitor_interval": 7}}, "monitor.interval = 7"),
    ],
)
def test_keys_of_earlier_versions_are_read_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: dict, new: str
) -> None:
    content = SMALL | ({"data": old["data"] | {"sequence_length": 128}} if "data" in old else old)
    config = configs.load(write(tmp_path, content))
    [record] = caplog.records
    assert record.getMessage().endswith(f"read as {new}")
    key, _, value = new.partition(" = ")
    section, _, leaf = key.partition(".")
    assert repr(getattr(getattr(config, section), leaf)) == value


def test_a_key_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    data = {"corpus": "builtin", "path": "prepared/pile", "sequence_length": 128}
    assert "is data.path now" in mistakes(tmp_path, SMALL | {"data": data})["data.corpus"]


def test_what_a_run_wrote_down_can_be_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by a version whose runs wrote every key, moved ones with nothing in them."""
    config = configs.load(write(tmp_path, SMALL))
    written = json.loads(config.model_dump_json())
    written["l2e"] |= {"monitor": None, "monitor_interval": 0}
    written["data"] |= {"corpus": None}
    assert configs.load(write(tmp_path, written)) == config
    assert not caplog.records


def test_zero_two_with_a_pipeline(tmp_path: Path) -> None:
    change = {"parallel": {"pipeline": 2}, "deepspeed": {"zero_optimization": {"stage": 2}}}
    found = mistakes(tmp_path, SMALL | change, processes=2)
    assert list(found) == ["deepspeed.zero_optimization.stage"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_at_zero_0(tmp_path: Path, dtype: str) -> None:
    train = SMALL["train"] | {"dtype": dtype}
    change = {"train": train, "deepspeed": {"zero_optimization": {"stage": 0}}}
    assert list(mistakes(tmp_path, SMALL | change)) == ["deepspeed.zero_optimization.stage"]


def test_more_processes_than_the_layout_needs(tmp_path: Path) -> None:
    found = mistakes(tmp_path, SMALL | {"parallel": {"tensor": 2}}, processes=3)
    assert "start 2 processes" in found["processes"]


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_what_is_no_json_object(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(configs.ConfigError, match=r"broken\.json"):
        configs.load(path)


def test_a_missing_file_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(configs.ConfigError, match=r"demo\.json"):
        configs.load(tmp_path / "none.json")


def test_every_key_has_a_help_line() -> None:
    text = configs.help_text()
    for key in keys():
        assert key.help, key.name
        assert key.name in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = configs.load(path)
    assert config.parallel.processes


def test_shipped_sizes_have_the_papers_settings() -> None:
    fractions = {"70m": 0.01, "410m": 0.02, "2.8b": 0.03}
    rates = {"70m": 1e-3, "410m": 3e-4, "2.8b": 1.6e-4}
    for name, fraction in fractions.items():
        config = configs.load(Path(configs.__file__).parent / f"{name}.json")
        assert config.l2e.inhibit_fraction == fraction
        assert config.l2e.layers == "mid2"
        assert config.train.steps == 14300
        assert config.train.global_batch_size == 1024
        assert config.optimizer.learning_rate == rates[name]
