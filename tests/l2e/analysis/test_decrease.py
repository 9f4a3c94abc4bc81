"""What one step does to monosemantic activations: MEmeL's order, and an exact small case."""

import json
from pathlib import Path

import pytest
import torch

from l2e.analysis.decrease import DecreaseOptions, analyze_decrease
from l2e.analysis.features import make_features
from l2e.analysis.networks import Network
from tests.l2e.analysis.conftest import byte_tokenizer
from tests.tiny_models import gpt_neox

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
TRAINING_STEPS = 400


@pytest.fixture(scope="module")
def trained():
    """A small model briefly trained on Python's own library, and held-out text of it."""
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))[:14]
    text = "".join(path.read_text(errors="ignore") for path in files)
    torch.manual_seed(0)
    model = gpt_neox(max_position_embeddings=64, vocab_size=257)
    network = Network(model, byte_tokenizer(), "brief")
    ids = torch.tensor(network.tokenizer(text[60_000:])["input_ids"])
    optimizer = torch.optim.AdamW(network.model.parameters(), lr=4e-3)
    network.model.train()
    for _ in range(TRAINING_STEPS):
        starts = torch.randint(len(ids) - 64, (16,))
        batch = torch.stack([ids[start : start + 64] for start in starts])
        optimizer.zero_grad()
        network.model(batch, labels=batch).loss.backward()
        optimizer.step()
    network.model.eval()
    passages = [text[start : start + 600] for start in range(0, 60_000, 600)]
    return network, make_features("code", passages, ["first", "second"] * 50)


def test_reversed_deactivation_decreases_more_than_training_and_naive_b_less(trained):
    """The order of MEmeL's Table 4."""
    network, features = trained
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    options = DecreaseOptions(learning_rate=0.001)
    result = analyze_decrease(network, features, options, max_tokens=64, progress=False)
    ratios = {arm: row["decrease_ratio_percent"] for arm, row in result["arms"].items()}
    assert ratios["reversed"] > ratios["original"] > ratios["naive b"], ratios
    assert all(row["total_update_ratio_percent"] > 0 for row in result["arms"].values())
    after = network.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in network.model.modules())


def test_a_step_of_size_zero_changes_nothing(trained):
    network, features = trained
    options = DecreaseOptions(learning_rate=0.0, batches=1)
    result = analyze_decrease(network, features, options, max_tokens=32, rows=2, progress=False)
    for row in result["arms"].values():
        assert row["decrease_ratio_percent"] == row["total_update_ratio_percent"] == 0


def test_too_little_text_is_refused(trained):
    network, features = trained
    with pytest.raises(ValueError, match=r"need .*ask for fewer batches"):
        analyze_decrease(network, features, DecreaseOptions(batches=10_000), progress=False)


@pytest.mark.parametrize(
    ("layers", "topk", "told"),
    [
        ("0,x", 1, "write block numbers"),
        ("nowhere", 1, "nowhere"),
        ("7", 1, "7"),
        ("0", 129, "129"),
    ],
)
def test_layers_and_neurons_that_are_not_there_are_named(trained, layers, topk, told):
    network, features = trained
    with pytest.raises(ValueError, match=told):
        analyze_decrease(network, features, DecreaseOptions(layers, topk), progress=False)
