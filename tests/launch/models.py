"""Small models on disk for the verbs' tests, in both forms, with a tokenizer that needs no file."""

import json
from pathlib import Path

import torch
from transformers import GPTNeoXForCausalLM

from tests import tiny_models

VOCABULARY = 300


def byte_tokenizer(folder: Path) -> Path:
    """tokenizer.json of `tiny_models.byte_tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_models.byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def huggingface_model(folder: Path, *, positions: int = 512) -> GPTNeoXForCausalLM:
    """A random two-block GPT-NeoX in Hugging Face's form, loud enough to prefer some answers."""
    torch.manual_seed(0)
    model = tiny_models.gpt_neox(
        vocab_size=VOCABULARY,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    ).eval()
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
