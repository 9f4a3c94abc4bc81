"""BERT fine-tuned on real sentences with each of the methods beside one another."""

import gzip
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification

import l2e
from l2e import L2EConfig

ARMS = {
    "none": {"method": "none"},
    "naive a": {"method": "deactivate", "delta": 0.0},
    "naive b": {"method": "deactivate", "delta": -1.0},
    "reversed": {"method": "deactivate", "delta": 1.0},
    "L2E": {"method": "regularize", "weight": 0.01},
}
TRAINED_ON, BATCH, STEPS, LENGTH = 100, 20, 40, 24


@pytest.fixture(scope="module")
def sentences(shared_data):
    """SST-2's labelled sentences as token ids [sentences, LENGTH] and labels."""
    with gzip.open(shared_data / "benchmarks" / "sst2_validation.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizer" / "20B_tokenizer.json"))
    tokenizer.enable_padding(length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    ids = torch.tensor([tokenizer.encode(row["sentence"]).ids for row in rows])
    used, ids = ids.unique(return_inverse=True)  # a small table of the tokens there are
    labels = torch.tensor([row["label"] for row in rows])
    return ids, labels, len(used)


def finetune(arm, sentences):
    """Training losses, held-out accuracy at the end, and the layers' numbers."""
    ids, labels, vocabulary = sentences
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2,
        hidden_size=32,
        hidden_dropout_prob=0.0,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=LENGTH,
    )
    model = BertForSequenceClassification(config).train()
    settings = {"selection": "topk", "neuron_axes": "position"} if arm != "L2E" else {}
    handle = l2e.attach(
        model,
        "bert.encoder.layer.*.intermediate",
        L2EConfig(late_start_step=10, forget_step=10, **settings | ARMS[arm]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(STEPS):
        rows = torch.randint(TRAINED_ON, (BATCH,))
        optimizer.zero_grad()
        loss = model(ids[rows], labels=labels[rows]).loss
        (loss + handle.loss()).backward()
        optimizer.step()
        handle.step()
        losses.append(loss.item())
    numbers = handle.metrics()
    with torch.no_grad():
        logits = model.eval()(ids[TRAINED_ON:]).logits
    accuracy = (logits.argmax(1) == labels[TRAINED_ON:]).float().mean()
    return losses, float(accuracy), numbers


def test_every_method_finetunes_bert(sentences):
    results = {arm: finetune(arm, sentences) for arm in ARMS}
    for arm, (losses, accuracy, numbers) in results.items():
        first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
        shares = [layer["selected_fraction"] for layer in numbers.values()]
        print(f"{arm:9} loss {first:.3f} -> {last:.3f}, held-out accuracy {accuracy:.3f}")
        assert last < first - 0.1, arm
        assert list(numbers) == [f"bert.encoder.layer.{n}.intermediate" for n in (0, 1)]
        if arm == "L2E":  # tau follows activations that still move fast
            assert all(0.005 < share < 0.1 for share in shares)
        else:  # one of 24 x 128 (position, unit) pairs a sentence
            assert shares == pytest.approx([1 / (LENGTH * 128)] * 2)
    # Until inhibition starts all arms are one run; then each goes its own way.
    for arm, (losses, _, _) in results.items():
        assert losses[:10] == results["none"][0][:10], arm
        assert (losses[-1] != results["none"][0][-1]) == (arm != "none"), arm
