"""All token files of a run hold one tokenizer's ids, and too short a side of a split is named."""

import json
from pathlib import Path

import pytest

import configs
from data.corpus import find_sources
from data.prepare import Preparation, prepare
from data.tokenizer import train_sentencepiece
from launch.training import data as run_data
from tests.data.conftest import make_texts, write_jsonl

CONFIG = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 384},
    "data": {"sequence_length": 32, "order": "neox"},
    "train": {"steps": 5, "global_batch_size": 4, "seed": 7},
    "evaluate": {"batches": 1},
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tokenizer) -> Path:
    """`a` and `b` of one tokenizer, `other` of another one as large, `short` of one document."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "t.model").write_bytes(tokenizer.path.read_bytes())
    train_sentencepiece(make_texts(200, seed=5), folder / "other.model", 320)
    for name, count, file in [
        ("a", 100, "t.model"),
        ("b", 100, "t.model"),
        ("other", 100, "other.model"),
        ("short", 1, "t.model"),
    ]:
        texts = [" ".join(make_texts(20))] if count == 1 else make_texts(count, seed=ord(name[0]))
        path = write_jsonl(folder / f"{name}.jsonl", texts)
        prepare(Preparation(find_sources([str(path)]), folder / file, str(folder / name)))
    (folder / "c.json").write_text(json.dumps(CONFIG))
    return folder


def load(corpora: Path, **settings: object) -> configs.Config:
    words = [f"data.validation_fraction={settings.pop('fraction', 0.2)}"]
    words += [f"{key.replace('_', '.', 1)}={json.dumps(value)}" for key, value in settings.items()]
    return configs.load(str(corpora / "c.json"), words)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_other_tokenizers_are_refused_in_blends_and_validation(corpora, with_tokenizer) -> None:
    a, b, other = (str(corpora / name) for name in ("a", "b", "other"))
    chosen = {"tokenizer_path": str(corpora / "t.model")} if with_tokenizer else {}
    for settings in (
        {"data_path": [a, other]},
        {"data_path": {a: 0.5, b: 0.3, other: 0.2}},
        {"data_path": a, "data_validation_path": other},
    ):
        with pytest.raises(ValueError, match="prepared with the tokenizer") as error:
            load(corpora, **settings, **chosen)
        assert other in str(error.value)
    assert load(corpora, data_path=[a, b], **chosen)


def test_what_the_hub_gives_is_held_against_the_rest_once_it_is_here(
    corpora, tmp_path, monkeypatch
) -> None:
    """A configuration that names the hub can't be checked before."""
    config = load(corpora, data_path="hf:some/tokens", data_validation_path=str(corpora / "a"))
    monkeypatch.setattr(run_data.hub, "fetch_tokens", lambda *_: str(corpora / "other"))
    with pytest.raises(ValueError, match="prepared with the tokenizer"):
        run_data.fetch(config, tmp_path)
    config = load(corpora, data_path=str(corpora / "a"), tokenizer_path="hf:some/tokenizer")
    monkeypatch.setattr(run_data.hub, "fetch_tokenizer", lambda *_: corpora / "other.model")
    with pytest.raises(ValueError, match="prepared with the tokenizer"):
        run_data.fetch(config, tmp_path)


def test_other_ends_of_text_are_refused(corpora) -> None:
    path = corpora / "b.manifest.json"
    written = path.read_text()
    path.write_text(json.dumps({**json.loads(written), "end_of_text": 3}))
    with pytest.raises(ValueError, match="its documents end with token 3"):
        load(corpora, data_path=[str(corpora / "a"), str(corpora / "b")])
    path.write_text(written)


def test_the_tokenizer_is_the_corpus_own_where_its_hash_fits(corpora, tmp_path) -> None:
    config = load(corpora, data_path=[str(corpora / "a"), str(corpora / "b")])
    assert run_data.fetch(config, tmp_path).tokenizer == corpora / "t.model"
    original = (corpora / "t.model").read_bytes()
    (corpora / "t.model").write_bytes((corpora / "other.model").read_bytes())
    assert run_data.fetch(config, tmp_path).tokenizer is None
    (corpora / "t.model").write_bytes(original)


def test_a_corpus_that_was_moved_has_its_tokenizer_beside_it(corpora, tmp_path) -> None:
    for name in ("a.bin", "a.idx", "a.manifest.json", "t.model"):
        (tmp_path / name).write_bytes((corpora / name).read_bytes())
    manifest = json.loads((tmp_path / "a.manifest.json").read_text())
    manifest["tokenizer_path"] = "/nowhere/any/more/t.model"
    (tmp_path / "a.manifest.json").write_text(json.dumps(manifest))
    config = load(corpora, data_path=str(tmp_path / "a"))
    assert run_data.fetch(config, tmp_path).tokenizer == tmp_path / "t.model"


@pytest.mark.parametrize(
    ("name", "fraction", "side"),
    [("short", 0.2, "validation"), ("short", 0.9, "training"), ("a", 0.01, "validation")],
)
def test_the_short_side_of_a_split_is_named(corpora, name, fraction, side) -> None:
    """At 0.01 one document of a hundred is held out, too short for the longer samples here."""
    settings = {"data_sequence_length": 500} if name == "a" else {}
    with pytest.raises(ValueError, match=f"the {side} side of data.validation_fraction") as error:
        load(corpora, data_path=str(corpora / name), fraction=fraction, **settings)
    assert "data.validation_path" in str(error.value)
