"""Reading configurations: defaults, overrides, and every mistake reported at once."""

import json
import re
from pathlib import Path

import pytest

import configs
from bench.random_tokens import write_random_tokens
from configs.deepspeed_keys import KNOWN
from configs.loading import keys

SMALL = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
    "data": {"path": "builtin", "sequence_length": 128},
    "tokenizer": {"vocab_size": 512},
    "schedule": {"warmup_steps": 2},
    "l2e": {"late_start_step": 5},
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


def test_a_section_given_by_set_keeps_its_other_keys(tmp_path: Path) -> None:
    content = SMALL | {
        "deepspeed": {
            "zero_optimization": {"stage": 2, "overlap_comm": False},
            "prescale_gradients": True,
        }
    }
    whole = 'deepspeed={"zero_optimization": {"stage": 3}}'
    config = configs.load(write(tmp_path, content), ['train={"steps": 7}', whole])
    assert config.train.model_dump(include={*SMALL["train"]}) == SMALL["train"] | {"steps": 7}
    assert config.deepspeed == {
        "zero_optimization": {"stage": 3, "overlap_comm": False},
        "prescale_gradients": True,
    }
    config = configs.load(write(tmp_path, SMALL), ['logging={"interval": 3}'])  # none in the file
    assert config.logging.interval == 3


def test_an_objects_place_in_set_is_a_section_or_one_key(tmp_path: Path) -> None:
    """A blend is one value, of which nothing stays; an empty section would set nothing."""
    content = SMALL | {"data": {"path": {"a": 1.0, "b": 2.0}, "sequence_length": 128}}
    with pytest.raises(configs.ConfigError) as report:
        configs.load(write(tmp_path, content), ['data={"path": {"c": 1.0}}'])
    assert [problem.value.name for problem in report.value.problems] == ["c.bin"]
    for empty in ("train={}", 'deepspeed={"zero_optimization": {}}'):
        with pytest.raises(configs.ConfigError, match="sets none of its keys"):
            configs.load(write(tmp_path, content), [empty])
    with pytest.raises(configs.ConfigError, match="train is no section"):
        configs.load(write(tmp_path, content | {"train": 5}), ['train={"steps": 7}'])


def test_no_key_that_names_something_may_be_blank(tmp_path: Path) -> None:
    """A blank folder is the one that the run was started in, and ~ would be made in it."""
    named = {key.name: key.type for key in keys() if re.match(r"(list\[)?str\b", key.type)}
    assert {"data.path", "data.cache_dir", "evaluate.task_data", "monitor.features"} <= set(named)
    for name, form in named.items():
        for value, told in (("", "blank"), (" ", "blank"), ("~/x", "shell"), ("$TMP/x", "shell")):
            given = [value] if form.startswith("list") else value
            found = mistakes(tmp_path, SMALL, f"{name}={json.dumps(given)}")
            assert told in found[name], name


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


def test_an_override_that_names_a_key_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(configs.ConfigError, match=r"--set data.path=.*'a' is there twice"):
        configs.load(write(tmp_path, SMALL), ['data.path={"a": 1, "a": 2}'])


@pytest.mark.parametrize(
    ("change", "key", "told"),
    [
        ({"model": {"preset": "71m"}}, "model.preset", "70m"),
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
        (
            {"data": SMALL["data"] | {"validation_path": "held/out"}},
            "data.validation_path",
            "a validation set of its own",
        ),
        ({"data": SMALL["data"] | {"order": "preshuffled"}}, "data.order", "documents"),
        ({"data": {"path": "nowhere/corpus", "sequence_length": 128}}, "data.path", "nowhere"),
        ({"deepspeed": {"zero_optimization": 2}}, "deepspeed.zero_optimization", "section"),
        ({"nonsense": {}}, "nonsense", "unknown key"),
        ({"model": {"preset": ["70m"]}}, "model.preset", "'70m'"),
        ({"model": {"preset": {}}}, "model.preset", "'70m'"),
        ({"model": SMALL["model"] | {"num_layers": True}}, "model.num_layers", "integer"),
        ({"model": SMALL["model"] | {"hidden_size": "64"}}, "model.hidden_size", "integer"),
        ({"model": SMALL["model"] | {"hidden_size": 2**31}}, "model.hidden_size", "bounds"),
        ({"model": 5}, "model", "5"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas", "tuple["),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas", "less than 1"),
        ({"optimizer": {"betas": [0.9, 0.9, 0.9]}}, "optimizer.betas", "3"),
        ({"optimizer": {"betas": [0.9, "0.9"]}}, "optimizer.betas", "number"),
        ({"optimizer": {"betas": {"a": 1}}}, "optimizer.betas", "tuple"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate", "finite"),
        ({"optimizer": {"eps": float("nan")}}, "optimizer.eps", "finite"),
        ({"optimizer": {"eps": 1e308}}, "optimizer.eps", "infinity in float32"),
        ({"optimizer": {"eps": 1e-300}}, "optimizer.eps", "nothing in float32"),
        ({"optimizer": {"eps": 2.0}}, "optimizer.eps", "less than or equal to 1"),
        ({"optimizer": {"betas": [0.9, 1e-300]}}, "optimizer.betas", "nothing in float32"),
        ({"optimizer": {"learning_rate": 1e-20}}, "optimizer.learning_rate", "less than float32"),
        ({"optimizer": {"learning_rate": 2}}, "optimizer.learning_rate", "more than 1 a step"),
        ({"optimizer": {"weight_decay": 1000}}, "optimizer.weight_decay", "whole weight away"),
        ({"optimizer": {"gradient_clipping": 1e-9}}, "optimizer.gradient_clipping", "eps = 1e-08"),
        ({"optimizer": {"gradient_clipping": 1e300}}, "optimizer.gradient_clipping", "infinity"),
        ({"model": SMALL["model"] | {"rotary_base": 1e-30}}, "model.rotary_base", "equal to 1"),
        ({"l2e": {"weight": 1e30}}, "l2e.weight", "at most"),
        ({"l2e": {"eps": 1e30}}, "l2e.eps", "at most"),
        ({"l2e": {"weight": float("inf")}}, "l2e.weight", "finite"),
        ({"l2e": {"topk": 2**40}}, "l2e.topk", "bounds"),
        ({"data": {"path": 5}}, "data.path", "str | list[str]"),
        ({"data": {"path": ["a", 5]}}, "data.path", "str | list[str]"),
        ({"data": {"path": {"a": "x"}}}, "data.path", "str | list[str]"),
        ({"data": {"path": "a\0b"}}, "data.path", "character"),
        ({"data": {"path": ["\ud800"]}}, "data.path", "character"),
        ({"data": {"path": "x" * 300}}, "data.path", "longer than a file's name"),
        ({"tokenizer": {"path": "a/" + "x" * 300}}, "tokenizer.path", "longer than a file's name"),
        ({"data": {"path": {"nowhere": 3 * 10**11}}}, "data.path", "nowhere"),
        ({"data": {"path": {"a": 1e308, "b": 1e308}}}, "data.path", "add up to infinity"),
        ({"tokenizer": {"vocab_size": 513}}, "tokenizer.vocab_size", "model.vocab_size = 512"),
        ({"checkpoint": {"steps": [-1]}}, "checkpoint.steps", "greater than or equal to 0"),
        ({"checkpoint": {"steps": 5}}, "checkpoint.steps", "list"),
        ({"train": SMALL["train"] | {"seed": 2**32}}, "train.seed", "4294967296"),
        ({"train": SMALL["train"] | {"steps": 2**31}}, "train.steps", "bounds"),
        ({"deepspeed": {"zero_optimisation": {}}}, "deepspeed.zero_optimisation", "zero_optimiz"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "deepspeed.fp16", "train.dtype is bf16"),
        ({"deepspeed": {"fp16": {}}}, "deepspeed.fp16", "train.dtype is bf16"),
        ({"deepspeed": {"amp": {"enabled": True}}}, "deepspeed.amp", "set train.dtype"),
        (
            {"deepspeed": {"zero_optimization": {"stagee": 2}}},
            "deepspeed.zero_optimization.stagee",
            "did you mean deepspeed.zero_optimization.stage?",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": "two"}}},
            "deepspeed.zero_optimization.stage",
            "from 0 to 3",
        ),
        ({"deepspeed": {"wall_clock_breakdown": "yes"}}, "deepspeed.wall_clock_breakdown", "true"),
        ({"deepspeed": []}, "deepspeed", "dict"),
    ],
)
def test_each_mistake_names_its_key(tmp_path: Path, change: dict, key: str, told: str) -> None:
    found = mistakes(tmp_path, SMALL | change)
    assert key in found, found
    assert told in found[key]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"data": {"path": 5, "sequence_length": 128}}, "data.path"),
        ({"l2e": {"layers": "foo"}}, "l2e.layers"),
        ({"model": {"preset": []}}, "model.preset"),
        ({"deepspeed": {"zero_optimization": {"stage": []}}}, "deepspeed.zero_optimization.stage"),
    ],
)
def test_no_other_key_is_blamed(tmp_path: Path, change: dict, key: str) -> None:
    assert list(mistakes(tmp_path, SMALL | change)) == [key]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL)[:-1] + ', "train": {"steps": 5}}')
    with pytest.raises(configs.ConfigError, match="'train' is there twice"):
        configs.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"train": {"steps": ' + "9" * 5000 + "}}"])
def test_what_json_itself_cannot_hold(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(configs.ConfigError):
        configs.load(path)
    with pytest.raises(configs.ConfigError, match=r"train\.steps"):
        configs.load(write(tmp_path, SMALL), [f"train.steps={text}"])


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8-sig")
    assert configs.load(path).train.steps == 10


def test_what_is_seldom_meant_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change = {
        "schedule": {"warmup_steps": 11},
        "l2e": {"late_start_step": 10},
        "checkpoint": {"steps": [0, 10, 12]},
        "tokenizer": {"path": "some/tokenizer.json", "vocab_size": 400},
        "train": SMALL["train"] | {"stop_after": 20},
    }
    configs.load(write(tmp_path, SMALL | change))
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(" ")[0].rstrip(":") for line in told] == [
        "schedule.warmup_steps",
        "l2e.late_start_step",
        "checkpoint.steps",
        "train.stop_after",
        "tokenizer.path",
    ]
    assert "[12]" in told[2]
    assert "trained, of tokenizer.vocab_size = 400 ids" in told[4]


def test_a_preset_that_the_keys_beside_it_override_is_said(tmp_path: Path, caplog) -> None:
    """`--set model.preset=70m` over a file that gives a shape."""
    for settings in (["model.preset=70m"], ['model={"preset": "70m"}']):
        caplog.clear()
        assert configs.load(write(tmp_path, SMALL), settings).model.hidden_size == 64
        (told,) = [record.getMessage() for record in caplog.records]
        assert "'70m': the keys beside it override it, num_layers = 4, hidden_size = 64" in told
    caplog.clear()
    whole = SMALL | {"model": {"preset": "70m", "vocab_size": 512}}
    configs.load(write(tmp_path, whole))
    assert not caplog.records


def test_validation_on_training_data_is_refused(tmp_path: Path) -> None:
    prefix = write_random_tokens(tmp_path / "tokens", 2**12, vocab_size=256)
    other = write_random_tokens(tmp_path / "other", 2**12, vocab_size=256)
    (tmp_path / "link.bin").symlink_to(f"{prefix}.bin")
    (tmp_path / "link.idx").symlink_to(f"{prefix}.idx")
    common = {"sequence_length": 16}
    for path, validation in (
        (str(prefix), str(prefix)),
        (str(prefix), str(tmp_path / "link")),
        ([str(other), str(prefix)], str(prefix)),
        ({str(prefix): 1.0, str(other): 2.0}, f"{tmp_path}/../{tmp_path.name}/tokens"),
    ):
        data = common | {"path": path, "validation_path": validation}
        found = mistakes(tmp_path, SMALL | {"data": data})
        assert "is the training data" in found["data.validation_path"]
    data = common | {"path": str(prefix), "validation_path": str(other)}
    configs.load(write(tmp_path, SMALL | {"data": data}))


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    own.mkdir()
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "link").symlink_to(shared)
    (shared / "mine").mkdir(mode=0o700)
    anybodys = tmp_path / "anybodys"  # without the bit by which only owners replace what is theirs
    anybodys.mkdir()
    anybodys.chmod(0o777)
    for folder in (shared, tmp_path / "link", anybodys, anybodys / "new"):
        data = SMALL["data"] | {"cache_dir": str(folder)}
        found = mistakes(tmp_path, SMALL | {"data": data})
        assert "can be written by every user" in found["data.cache_dir"]
    for folder in (own, own / "new", shared / "mine" / "new", shared / "new" / "deeper"):
        configs.load(write(tmp_path, SMALL | {"data": SMALL["data"] | {"cache_dir": str(folder)}}))


def test_more_samples_than_memory_can_order_are_refused(tmp_path: Path) -> None:
    prefix = write_random_tokens(tmp_path / "tokens", 2**12, vocab_size=256)
    train = SMALL["train"] | {"steps": 2**31 - 1, "global_batch_size": 2**20}
    data = {"path": str(prefix), "sequence_length": 16}
    found = mistakes(tmp_path, SMALL | {"data": data, "train": train})
    assert "GiB" in found["data.path"]


def test_the_passed_on_keys_are_deepspeeds() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    words = [getattr(constants, name) for name in dir(constants) if name.isupper()]
    for section, fields in (
        ("zero_optimization", DeepSpeedZeroConfig.model_fields),
        ("fp16", DeepSpeedFP16Config.model_fields),
    ):
        assert set(KNOWN[section]) <= {field.alias or name for name, field in fields.items()}
    outside = {"zero_optimization", "timers", "comms_logger", "flops_profiler"}
    assert [key for key in KNOWN if key not in words] == sorted(outside, key=list(KNOWN).index)


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
    [(section, given)] = old.items()
    kept = {key: value for key, value in SMALL[section].items() if key != "path"}
    content = SMALL | {section: kept | given}
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
