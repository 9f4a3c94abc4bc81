"""MEmeL on BERT: a GLUE file, four modules in the middle of twelve.

python docs/how_to/memel_bert.py --data cola.jsonl.gz
python docs/how_to/memel_bert.py --data mrpc.jsonl.gz --model bert-base-uncased --steps 300

Lines of the file: {"sentence": ..., "label": 0 or 1}, or with sentence1 and sentence2. Every fifth
is kept for validation. Without --model a small BERT of twelve layers learns from nothing.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import memel
import torch
from torch import Tensor, nn

import l2e

BATCH, LENGTH = 32, 64
Encode = Callable[[list[str]], list[int]]
PADDING, UNKNOWN, START, END = range(4)


def main() -> None:
    parser = memel.parser(__doc__, steps=100)
    parser.add_argument("--data", type=Path, required=True, help="a GLUE task as JSON lines")
    parser.add_argument("--model", help="a pretrained BERT: a folder or a hub id")
    arguments = parser.parse_args()
    examples = read(arguments.data)
    held_out = torch.arange(len(examples)) % 5 == 4
    trained = [example for number, example in enumerate(examples) if not held_out[number]]
    encode = words_of(trained) if arguments.model is None else tokens_of(arguments.model)
    ids, mask, labels = batch_of(examples, encode)

    def train(config: l2e.L2EConfig, seed: int) -> memel.Scores:
        torch.manual_seed(seed)
        model = (
            small(int(ids.max()) + 1) if arguments.model is None else pretrained(arguments.model)
        )
        rate = 5e-4 if arguments.model is None else 2e-5
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        pattern = "bert.encoder.layer.*.intermediate"
        handle = l2e.attach(model, pattern, config, mask="attention_mask")
        chosen = (~held_out).nonzero().flatten()
        model.train()
        for numbers in memel.orders(len(chosen), BATCH, arguments.steps, seed):
            rows = chosen[numbers]
            longest = int(mask[rows].sum(1).max())
            words, counts = ids[rows, :longest], mask[rows, :longest]
            out = model(input_ids=words, attention_mask=counts, labels=labels[rows])
            (out.loss + handle.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.step()
        return validate(model, ids[held_out], mask[held_out], labels[held_out])

    memel.compare(train, [4, 5, 6, 7], arguments)


@torch.no_grad()
def validate(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> memel.Scores:
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits
    guess = logits.argmax(1)
    counts = torch.stack([guess, labels])
    matthews = counts.double().corrcoef()[0, 1].nan_to_num()  # 0 if one answer is always given
    return {
        "loss": nn.functional.cross_entropy(logits, labels).item(),
        "accuracy": (guess == labels).double().mean().item(),
        "Matthews": matthews.item(),
    }


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def batch_of(examples: list[dict], encode: Encode) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and what of them is no padding, [examples, longest], and labels [examples]."""
    tokens = [torch.tensor(encode(texts(example))[:LENGTH]) for example in examples]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PADDING)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    return ids, mask, torch.tensor([example["label"] for example in examples])


def texts(example: dict) -> list[str]:
    return [example[key] for key in ("sentence", "sentence1", "sentence2") if key in example]


def words_of(examples: list[dict]) -> Encode:
    """Word numbers, of words that are there twice."""

    def split(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    counts = Counter(w for example in examples for text in texts(example) for w in split(text))
    known = {word: n for n, word in enumerate((w for w, c in counts.items() if c > 1), END + 1)}

    def encode(parts: list[str]) -> list[int]:
        numbers = [START]
        for part in parts:
            numbers += [known.get(word, UNKNOWN) for word in split(part)] + [END]
        return numbers

    return encode


def tokens_of(name: str) -> Encode:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda parts: tokenizer(*parts)["input_ids"]


def small(vocabulary: int) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            num_hidden_layers=12,
            num_attention_heads=2,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
        )
    )


def pretrained(name: str) -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification.from_pretrained(name)


if __name__ == "__main__":
    main()
