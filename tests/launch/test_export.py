"""Checkpoints to Hugging Face's form and back, and the verb's refusals."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.checkpoint import huggingface
from launch.checkpoint.folders import FILES, FORMAT, read_records, write_text
from launch.checkpoint.stored import StoredCheckpoint
from launch.export import main
from tests.launch.models import huggingface_model
from tests.launch.running import refused, succeeds


def export(*arguments: object) -> None:
    main([*map(str, arguments)])


def refusal(*arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        export(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model in Hugging Face's form, the checkpoint from it, and the export of that."""
    root = tmp_path_factory.mktemp("export")
    found = {name: root / name for name in ("original", "checkpoint", "exported", "again")}
    huggingface_model(found["original"])
    export("from-hf", "--model", found["original"], "--output", found["checkpoint"])
    export("to-hf", "--checkpoint", found["checkpoint"], "--output", found["exported"])
    export("from-hf", "--model", found["exported"], "--output", found["again"])
    return found


def test_export_is_the_original_to_the_bit(folders):
    original = AutoModelForCausalLM.from_pretrained(folders["original"])
    exported = AutoModelForCausalLM.from_pretrained(folders["exported"])
    expected, found = original.state_dict(), exported.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    text = "Real text: naïve, 123 — done."
    tokenizer = AutoTokenizer.from_pretrained(folders["exported"])
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens[0].tolist() == list(
        AutoTokenizer.from_pretrained(folders["original"]).encode(text)
    )
    assert tokenizer.decode(tokens[0]) == text
    assert torch.equal(exported(tokens).logits, original(tokens).logits)


def test_round_trip_is_hash_equal(folders):
    def hashes(folder: Path) -> dict[str, str]:
        files = sorted(folder.glob("model-*.safetensors"))
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    assert hashes(folders["checkpoint"])
    assert hashes(folders["again"]) == hashes(folders["checkpoint"])


def test_special_tokens_survive_the_round_trip(folders, tmp_path):
    """A model whose texts begin with 5 and end with 7, and that samples by default."""
    original = shutil.copytree(folders["original"], tmp_path / "original")
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(
        json.dumps(config | {"bos_token_id": 5, "eos_token_id": 7})
    )
    generation = {"bos_token_id": 5, "eos_token_id": [7, 8], "do_sample": True, "temperature": 0.7}
    (original / "generation_config.json").write_text(json.dumps(generation))
    special = {"bos_token": "#", "eos_token": "%", "tokenizer_class": "PreTrainedTokenizerFast"}
    (original / "tokenizer_config.json").write_text(json.dumps(special))
    export("from-hf", "--model", original, "--output", tmp_path / "checkpoint")
    for number, words in enumerate(([], ["--no-tokenizer"])):
        output = tmp_path / f"exported{number}"
        export("to-hf", "--checkpoint", tmp_path / "checkpoint", "--output", output, *words)
        model = AutoModelForCausalLM.from_pretrained(output)
        assert (model.config.bos_token_id, model.config.eos_token_id) == (5, 7)
        assert model.generation_config.eos_token_id == [7, 8]
        assert model.generation_config.temperature == 0.7
        assert (output / "tokenizer.json").exists() == (not words)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported0")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("#", "%")


def test_special_tokens_are_the_tokenizers(folders, tmp_path):
    """Of a run's own checkpoint, which no configuration of Hugging Face's came with."""
    checkpoint = shutil.copytree(folders["checkpoint"], tmp_path / "checkpoint")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["special_tokens"]
    for name in ("generation_config.json", "tokenizer_config.json"):
        (checkpoint / name).unlink(missing_ok=True)
    records = present(checkpoint)
    records["state.json"] = write_text(checkpoint / "state.json", json.dumps(state))
    write_records(checkpoint, records)
    export("to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert model.config.bos_token_id is None  # the tokenizer has none
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 0
    export("to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "alone", "--no-tokenizer")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "alone").config.eos_token_id is None


def present(checkpoint: Path) -> dict:
    """The records of the files that are there."""
    records = read_records(checkpoint)
    return {name: record for name, record in records.items() if (checkpoint / name).is_file()}


def write_records(checkpoint: Path, records: dict) -> None:
    """Let the checkpoint be what it has been changed to."""
    files = {name: dataclasses.asdict(record) for name, record in records.items()}
    (checkpoint / FILES).write_text(json.dumps({"format": FORMAT, "files": files}))


def test_an_export_has_a_model_card_that_loads_it(folders, tmp_path, monkeypatch):
    """Its facts are the run's; its code is run as it stands."""
    run = tmp_path / "run"
    checkpoint = shutil.copytree(folders["checkpoint"], run / "checkpoints" / "step_0000000")
    (run / "results").mkdir()
    report = {"results": {"sciq": {"acc": 0.625, "acc_stderr": 0.0125}}, "shots": {"sciq": 5}}
    (run / "results" / "evaluate_5shot_step_0000000.json").write_text(json.dumps(report))
    (run / "manifest.json").write_text(json.dumps({"versions": {"deepspeed": "0.0.1"}}))
    monkeypatch.chdir(tmp_path)
    export("to-hf", "--checkpoint", checkpoint, "--output", "exported")
    card = ModelCard.load("exported/README.md")
    assert card.data.library_name == "transformers"
    for told in ("original", "| sciq, acc, 5 shots | 0.6250 ± 0.0125 |", "deepspeed | 0.0.1 |"):
        assert told in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["tokenizer"]("a").input_ids
    assert names["model"].config.vocab_size == 300


@pytest.mark.parametrize("revision", ["main", "step0"])
def test_a_hub_id_is_fetched_in_any_revision(folders, tmp_path, revision):
    """Read from a cache laid out as the hub's client keeps it; step0 has pickled weights alone."""
    repository = tmp_path / "hub" / "models--someone--pythia"
    for number, name in enumerate(("main", "step0")):
        commit = str(number) * 40
        shutil.copytree(folders["original"], repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    safe = repository / "snapshots" / ("1" * 40) / "model.safetensors"
    torch.save(load_file(safe), safe.with_name("pytorch_model.bin"))
    safe.unlink()
    output = tmp_path / "checkpoint"
    succeeds(
        "launch/export.py", "from-hf", "--model", f"someone/pythia@{revision}",
        "--output", output, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    stored, expected = StoredCheckpoint(output), StoredCheckpoint(folders["checkpoint"])
    assert stored.tensors["model"].keys() == expected.tensors["model"].keys()
    assert all(
        torch.equal(stored.read(name), expected.read(name)) for name in expected.tensors["model"]
    )
    assert stored.tokenizer is not None
    assert f"someone/pythia@{revision}" in stored.state["source"]


def test_large_models_are_written_in_shards(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 50_000)
    export("to-hf", "--checkpoint", folders["checkpoint"], "--output", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 1
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded").state_dict()
    whole = AutoModelForCausalLM.from_pretrained(folders["original"]).state_dict()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)
    export("from-hf", "--model", tmp_path / "sharded", "--output", tmp_path / "back")
    stored = StoredCheckpoint(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1
    for name in stored.tensors["model"]:
        theirs = whole["lm_head.weight" if name == "embed_out.weight" else name]
        assert torch.equal(stored.read(name), theirs)


def test_low_precision_export(folders, tmp_path):
    export(
        "to-hf",
        "--checkpoint",
        folders["checkpoint"],
        "--output",
        tmp_path / "h",
        "--dtype",
        "fp16",
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "h", dtype="auto").dtype == torch.float16


def test_wrong_logits_stop_the_export(folders, tmp_path, monkeypatch):
    """The comparison is there to fail: an exporter that mixes up two matrices must not pass."""
    write = huggingface.write_hugging_face

    def mixed_up(folder, config, read, **options):
        def read_mixed_up(name: str) -> torch.Tensor:
            other = name.replace("layers.0.mlp.dense_h_to_4h", "layers.1.mlp.dense_h_to_4h")
            return read(other).clone()

        return write(folder, config, read_mixed_up, **options)

    monkeypatch.setattr(huggingface, "write_hugging_face", mixed_up)
    output = tmp_path / "wrong"
    assert "logits differ" in refusal(
        "to-hf", "--checkpoint", folders["checkpoint"], "--output", output
    )
    assert not list(tmp_path.iterdir())


def test_reshard_copies_every_tensor_for_another_layout(folders, tmp_path):
    output = tmp_path / "tp2"
    export(
        *("reshard", "--checkpoint", folders["checkpoint"], "--output", output),
        *("--tensor", 2, "--pipeline", 2),
    )
    source, copy = StoredCheckpoint(folders["checkpoint"]), StoredCheckpoint(output)
    assert copy.config["parallel"] == {"tensor": 2, "pipeline": 2}
    assert copy.config["model"] == source.config["model"]
    for name in source.tensors["model"]:
        assert torch.equal(copy.read(name), source.read(name))


def test_mistakes_are_messages(folders, tmp_path):
    checkpoint, output = folders["checkpoint"], tmp_path / "output"
    given = ("--checkpoint", checkpoint, "--output", output)
    assert "4 attention heads" in refusal("reshard", *given, "--tensor", 3)
    assert "2 layers" in refusal("reshard", *given, "--tensor", 1, "--pipeline", 3)
    assert "neither a checkpoint" in refusal("to-hf", "--checkpoint", tmp_path, "--output", output)
    assert "exists already" in refusal("to-hf", "--checkpoint", checkpoint, "--output", tmp_path)
    assert "neither a folder nor a hub id" in refusal(
        "from-hf", "--model", "no-such-folder", "--output", output
    )
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "only 'gpt_neox'" in refusal("from-hf", "--model", llama, "--output", output)
    assert not output.exists()


def test_a_damaged_checkpoint_is_not_exported(folders, tmp_path):
    export(
        *("reshard", "--checkpoint", folders["checkpoint"], "--output", tmp_path / "copy"),
        *("--tensor", 1),
    )
    file = next((tmp_path / "copy").glob("model-*"))
    file.rename(tmp_path / "copy" / "model-00001-of-00002.safetensors")
    told = refusal("to-hf", "--checkpoint", tmp_path / "copy", "--output", tmp_path / "output")
    assert f"{file.name} is missing" in told
    assert "model-00001-of-00002.safetensors" in told


def test_verb_ends_with_status_2_and_the_message_alone(tmp_path):
    command = ["to-hf", "--checkpoint", tmp_path, "--output", tmp_path / "out"]
    assert "neither a checkpoint" in refused("launch/export.py", *command)
