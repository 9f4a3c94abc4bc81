"""Small random models of the three families, and a byte-level tokenizer for them."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from l2e.analysis.features import FeatureSet, make_features
from l2e.analysis.networks import Network
from tests import tiny_models

VOCABULARY = 257


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_models.byte_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tiny_models.END_OF_TEXT)


def make_model(family: str, layers: int = 3, hidden: int = 32):
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    settings |= {
        "gpt_neox": {"max_position_embeddings": 128},
        "gpt2": {"n_head": 4, "n_positions": 128},
        "llama": {
            "num_attention_heads": 4,
            "intermediate_size": 3 * hidden,
            "max_position_embeddings": 128,
        },
    }[family]
    model = getattr(tiny_models, family)(layers, hidden, **settings)
    # Larger weights than the default make every neuron's effect visible.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            elif not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(params=["gpt_neox", "gpt2", "llama"])
def network(request) -> Network:
    return Network(make_model(request.param), byte_tokenizer(), request.param)


@pytest.fixture
def neox() -> Network:
    return Network(make_model("gpt_neox"), byte_tokenizer(), "gpt_neox")


def letters(feature: int, index: int) -> str:
    """A passage over the letters of one feature: abcd, efgh, ..., of differing length."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"[4 * feature : 4 * feature + 4]
    return "".join(alphabet[(index * 7 + i * i + i) % 4] for i in range(5 + (index * 3) % 20))


def write_letters(path: Path, features: Iterable[int] = range(2), passages: int = 12) -> Path:
    """A feature file of so many passages of each of the features f0, f1, ..."""
    rows = [{"text": letters(f, i), "feature": f"f{f}"} for i in range(passages) for f in features]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def save_model(folder: Path, factor: float = 1.0) -> None:
    """A GPT-NeoX of two layers, its weights times `factor`, with a tokenizer."""
    model = make_model("gpt_neox", layers=2, hidden=128)
    for parameter in model.parameters():
        parameter.data.mul_(factor)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture
def letter_features() -> FeatureSet:
    """Three features of 40 passages each."""
    rows = [(letters(f, i), f"letters{f}") for i in range(40) for f in range(3)]
    return make_features("letters", [text for text, _ in rows], [name for _, name in rows])
