"""What an export says of its tokenizer, as transformers reads it."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from launch.checkpoint.tokenizer_files import write_tokenizer


@pytest.mark.parametrize("chosen", [None, "</s>", "<|endoftext|>"])
def test_texts_end_as_those_of_the_training_did(tmp_path, chosen):
    """By the token that prepare.py --end-of-text chose, else by the one named beside the file."""
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "tokenizer.json"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "</s>"])
    tokenizer.save(str(path))
    beside = {"eos_token": "<|endoftext|>", "bos_token": "</s>", "model_max_length": 77}
    path.with_name("tokenizer_config.json").write_text(json.dumps(beside))
    stops = {"eos_token_id": 256, "temperature": 0.7, "do_sample": True}
    path.with_name("generation_config.json").write_text(json.dumps(stops))

    output = tmp_path / "output"
    output.mkdir()
    ids = write_tokenizer(path, output, ["a text"], chosen)

    written = AutoTokenizer.from_pretrained(output)
    end = chosen or "<|endoftext|>"
    assert written.eos_token == end
    assert (written.bos_token, written.model_max_length) == ("</s>", 77)
    generation = GenerationConfig.from_pretrained(output)
    assert generation.temperature == 0.7
    assert generation.eos_token_id == ids["eos_token_id"] == tokenizer.token_to_id(end)
