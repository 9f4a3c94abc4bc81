"""Weights and configurations go to Hugging Face's form and back, and are refused when wrong."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model import ModelConfig
from model.gpt_neox import GPTNeoX
from model.huggingface import (
    HuggingFaceWeights,
    read_config,
    write_hugging_face,
)
from model.parameters import parameter_shapes
from tests.tiny_models import counterpart

CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=300)


@pytest.fixture
def model(one_process) -> GPTNeoX:
    return GPTNeoX(CONFIG, seed=1).eval()


@pytest.fixture
def exported(model, tmp_path):
    write_hugging_face(tmp_path / "hf", CONFIG, model.state_dict().__getitem__)
    return tmp_path / "hf"


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shard_bytes", [10**9, 10**5], ids=["one file", "sharded"])
def test_transformers_loads_the_export_and_computes_the_same_logits(model, tmp_path, shard_bytes):
    state = model.state_dict()
    paths = write_hugging_face(tmp_path, CONFIG, state.__getitem__, shard_bytes=shard_bytes)
    files = [path for path in paths if path.suffix == ".safetensors"]
    assert (len(files) > 1) == (shard_bytes == 10**5)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shard_bytes", [10**9, 10**5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back_changes_no_byte(model, tmp_path, dtype, shard_bytes):
    first, second = tmp_path / "first", tmp_path / "second"
    state = model.state_dict()
    write_hugging_face(first, CONFIG, state.__getitem__, dtype=dtype, shard_bytes=shard_bytes)
    assert read_config(first) == CONFIG
    weights = HuggingFaceWeights(first, CONFIG)
    write_hugging_face(second, CONFIG, weights.read, dtype=dtype, shard_bytes=shard_bytes)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_transformers_saves_is_read(tmp_path):
    theirs = counterpart(CONFIG)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_config(tmp_path) == CONFIG
    weights = dict(HuggingFaceWeights(tmp_path, CONFIG).items())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(weights[name.replace("lm_head", "embed_out")], tensor), name


def test_old_revisions_pickles_and_buffers(exported):
    """Early Pythia files hold causal masks and rotary frequencies, and are pickled tensors."""
    state = load_file(exported / "model.safetensors")
    old = dict(state)
    for number in range(CONFIG.num_layers):
        attention = f"gpt_neox.layers.{number}.attention"
        old[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        old[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        old[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
    (exported / "model.safetensors").unlink()
    torch.save(old, exported / "pytorch_model.bin")
    weights = dict(HuggingFaceWeights(exported, CONFIG).items())
    assert list(weights) == list(parameter_shapes(CONFIG))
    for name, tensor in state.items():
        assert torch.equal(weights[name], tensor), name


def test_parameter_shapes_are_those_of_the_built_model(model):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for table in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        shapes[table] = (CONFIG.vocab_size, CONFIG.hidden_size)
    assert parameter_shapes(CONFIG) == shapes


@pytest.mark.parametrize("act", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
def test_tanh_gelus_of_other_names(exported, act):
    edit_config(exported, hidden_act=act)
    assert read_config(exported).activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', only 'gpt_neox'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"attention_bias": False}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "scaled .'linear'"),
        ({"num_attention_heads": 5}, "5 heads do not divide"),
    ],
)
def test_other_architectures_are_refused(exported, changes, message):
    edit_config(exported, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(exported)


def test_missing_unexpected_and_misshapen_tensors_are_named(exported):
    path = exported / "model.safetensors"
    state = load_file(path)
    del state["gpt_neox.final_layer_norm.bias"]
    state["gpt_neox.layers.2.mlp.dense_h_to_4h.bias"] = torch.zeros(256)
    state["embed_out.weight"] = torch.zeros(384, 64)
    save_file(state, path)
    with pytest.raises(ValueError, match="3 problems") as refusal:
        HuggingFaceWeights(exported, CONFIG)
    for problem in (
        "final_layer_norm.bias is missing",
        "layers.2.mlp.dense_h_to_4h.bias [256] is no parameter",
        "embed_out.weight is [384, 64], not [300, 64]",
    ):
        assert problem in str(refusal.value)


def test_a_missing_shard_a_damaged_file_and_an_empty_folder_are_named(model, tmp_path):
    state = model.state_dict()
    write_hugging_face(tmp_path / "a", CONFIG, state.__getitem__, shard_bytes=10**5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = sorted((tmp_path / "a").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=first.name):
        HuggingFaceWeights(tmp_path / "a", CONFIG)
    damaged = tmp_path / "b" / first.name
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{first.name} cannot be read"):
        HuggingFaceWeights(tmp_path / "b", CONFIG)
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="no weights"):
        HuggingFaceWeights(tmp_path, CONFIG)
