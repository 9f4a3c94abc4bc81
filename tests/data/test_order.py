"""The orders against slow, plain readings of them, and megatron-core's against itself."""

import hashlib

import numpy as np
import pytest

from data.dataset import open_dataset
from data.order import count_epochs
from tests.data.conftest import random_documents, write_tokens

SEED = 1234


def plain_neox(documents: list[np.ndarray], length: int, samples: int) -> list[np.ndarray]:
    """What gpt-neox 1.0 does, as one would tell it: whole epochs, two shuffles, no index."""
    tokens = sum(map(len, documents))
    epochs = 1
    while (epochs * tokens - 1) // length < samples:
        epochs += 1
    random = np.random.RandomState(SEED)
    visits = [number for _ in range(epochs) for number in range(len(documents))]
    random.shuffle(visits)
    stream = np.concatenate([documents[number] for number in visits])
    numbers = list(range((len(stream) - 1) // length))
    random.shuffle(numbers)
    return [stream[number * length : (number + 1) * length + 1] for number in numbers]


@pytest.mark.parametrize(("samples", "epochs"), [(40, 1), (150, 4)])
def test_neox_is_gpt_neox(tmp_path, samples, epochs):
    documents = [*random_documents(50), np.array([], int), *random_documents(8, seed=1)]
    opened = open_dataset(write_tokens(tmp_path / "x", documents), 32, SEED, samples)
    expected = plain_neox(documents, 32, int(np.ceil(samples * 1.005)))
    assert opened.identity()["epochs"] == epochs
    assert len(opened) == len(expected)
    for i, sample in enumerate(expected):
        np.testing.assert_array_equal(opened[i], sample)


def test_neox_asks_for_half_a_percent_more(tmp_path):
    """1,000 samples of a file of exactly 1,000 need a second epoch, as in gpt-neox."""
    prefix = write_tokens(tmp_path / "x", [np.arange(4001) % 500])
    assert open_dataset(prefix, 4, SEED, 995).identity()["epochs"] == 1
    assert open_dataset(prefix, 4, SEED, 996).identity()["epochs"] == 2


def test_known_order(tmp_path):
    """Numbers written down once: NumPy must never shuffle otherwise, nor may the hash change."""
    prefix = write_tokens(tmp_path / "x", [[10 * d + i for i in range(4)] for d in range(5)])
    opened = open_dataset(prefix, 3, SEED, 5)
    assert [opened[i].tolist() for i in range(len(opened))] == KNOWN_SAMPLES
    assert (
        opened.order_hash(2)
        == hashlib.sha256(np.array(KNOWN_SAMPLES[:2], "<u4").tobytes()).hexdigest()
    )


KNOWN_SAMPLES = [
    [23, 30, 31, 32],
    [2, 3, 10, 11],
    [11, 12, 13, 20],
    [43, 0, 1, 2],
    [40, 41, 42, 43],
    [20, 21, 22, 23],
]


class Tokenizer:
    """What megatron-core asks of one."""

    vocab_size, eod, unique_identifiers = 500, 0, {}


def megatron_config(gpt, blend: tuple, **settings):
    """megatron-core's own configuration of a data set."""
    return gpt.GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=32,
        blend=blend,
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **settings,
    )


@pytest.mark.parametrize("samples", [40, 60, 75, 150, 170])
def test_megatron_is_megatrons(tmp_path, samples):
    """Within one epoch, and with little or much of the last epoch wanted."""
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    documents = [d for d in random_documents(50) if len(d)]
    prefix = write_tokens(tmp_path / "x", documents)

    config = megatron_config(gpt, ([prefix], None), path_to_cache=str(tmp_path / "cache"))
    indices = np.arange(len(documents), dtype=np.int32)
    theirs = gpt.GPTDataset(IndexedDataset(prefix), prefix, indices, samples, Split.train, config)
    ours = open_dataset(prefix, 32, SEED, samples, order="megatron")
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        item = theirs[i]
        np.testing.assert_array_equal(ours[i][:-1], item["tokens"])
        np.testing.assert_array_equal(ours[i][1:], item["labels"])


def test_preshuffled_is_the_files_own_order(tmp_path):
    rows = np.random.RandomState(0).randint(0, 500, (24, 33))
    prefix = write_tokens(tmp_path / "x", list(rows))
    opened = open_dataset(prefix, 32, SEED, 24, order="preshuffled")
    np.testing.assert_array_equal(np.stack([opened[i] for i in range(24)]), rows)


@pytest.mark.parametrize("tokens", [10, 33, 34, 1000])
@pytest.mark.parametrize("samples", [1, 2, 31, 999])
def test_epochs_are_the_fewest_that_do(tokens, samples):
    epochs = count_epochs(tokens, 32, samples)
    assert (epochs * tokens - 1) // 32 >= samples > ((epochs - 1) * tokens - 1) // 32


# 3,201 tokens are 100 samples of 32 + 1 and not one more: half a percent on top is an epoch more.
HUNDRED_SAMPLES = [*np.split(np.random.RandomState(5).randint(0, 500, 3200), 100), np.array([7])]


@pytest.mark.parametrize("exact", [False, True])
def test_a_megatron_blend_is_megatrons(tmp_path, exact):
    """The whole of megatron-core's builder, as its trainers call it."""
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets import blended_megatron_dataset_builder as builder

    corpora = [HUNDRED_SAMPLES if exact else random_documents(40 + 30 * i, i) for i in range(3)]
    prefixes = [write_tokens(tmp_path / str(i), corpus) for i, corpus in enumerate(corpora)]
    weights = [0.5, 0.3, 0.2]

    [theirs, *_] = builder.BlendedMegatronDatasetBuilder(
        gpt.GPTDataset, [200, 0, 0], lambda: True, megatron_config(gpt, (prefixes, weights))
    ).build()
    ours = open_dataset(dict(zip(prefixes, weights, strict=True)), 32, SEED, 200, "megatron")
    for i in range(200):
        np.testing.assert_array_equal(ours[i][:-1], theirs[i]["tokens"])
