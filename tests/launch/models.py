"""Small models on disk for the verbs' tests, in both forms, with a tokenizer that needs no file."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

VOCABULARY = 300


def byte_tokenizer(folder: Path) -> Path:
    """tokenizer.json with a token for each byte, and `<|endoftext|>` as id 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def huggingface_model(
    folder: Path, *, positions: int = 512, rows: int = VOCABULARY, parallel: bool = True
) -> GPTNeoXForCausalLM:
    """A random two-block GPT-NeoX in Hugging Face's form, loud enough to prefer some answers."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=rows,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=positions,
        use_parallel_residual=parallel,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return model


def write_sciq(folder: Path, items: int = 12) -> Path:
    """Invented SciQ items in the official field names."""
    folder.mkdir(parents=True, exist_ok=True)
    things = ["water", "iron", "salt", "ice", "air", "sand", "wood", "coal", "oil", "gold"]
    rows = [
        {
            "question": f"What is thing number {i}?",
            "distractor1": things[i % 10],
            "distractor2": things[(i + 3) % 10],
            "distractor3": things[(i + 5) % 10],
            "correct_answer": things[(i + 7) % 10],
            "support": f"Thing number {i} is a thing." if i % 3 else "",
        }
        for i in range(items)
    ]
    path = folder / "sciq_test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
