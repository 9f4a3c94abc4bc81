"""Blends, splits, the hash of the order, and what is refused."""

import os

import numpy as np
import pytest

from data.dataset import open_dataset, split_documents
from tests.data.conftest import random_documents, write_tokens

SEED = 1234


def mark(number: int, count: int) -> list[np.ndarray]:
    """Documents whose every token is `number`, to see which file a sample is from."""
    return [np.full(50, number) for _ in range(count)]


@pytest.mark.parametrize("order", ["neox", "megatron"])
def test_a_blend_keeps_its_shares_at_every_moment(tmp_path, order):
    prefixes = [write_tokens(tmp_path / str(i), mark(i, 300)) for i in range(3)]
    weights = dict(zip(prefixes, (5, 3, 2), strict=True))
    blend = open_dataset(weights, 16, SEED, 500, order)
    sources = np.array([blend[i][0] for i in range(500)])
    for share, number in ((0.5, 0), (0.3, 1), (0.2, 2)):
        seen = np.cumsum(sources == number)
        assert np.abs(seen - share * np.arange(1, 501)).max() <= 1
        assert seen[-1] == share * 500


def test_a_blend_reads_each_file_in_its_own_order(tmp_path):
    prefixes = [write_tokens(tmp_path / str(i), random_documents(80, seed=i)) for i in range(2)]
    blend = open_dataset(dict.fromkeys(prefixes, 1.0), 16, SEED, 60)
    singles = [open_dataset(prefix, 16, SEED, 30) for prefix in prefixes]
    found = [blend.pieces(i)[0].file.prefix for i in range(60)]
    for prefix, single in zip(prefixes, singles, strict=True):
        numbers = [i for i in range(60) if found[i] == prefix]
        for own, i in enumerate(numbers):
            np.testing.assert_array_equal(blend[i], single[own])


def test_a_blend_is_megatrons_own(tmp_path):
    """Which file each sample is from, by Megatron's BlendedDataset's rule, written out."""
    prefixes = [write_tokens(tmp_path / str(i), mark(i, 100)) for i in range(3)]
    weights = np.array([0.61, 0.28, 0.11])
    blend = open_dataset(dict(zip(prefixes, weights.tolist(), strict=True)), 16, SEED, 200)
    taken = np.zeros(3)
    for i in range(200):
        behind = weights / weights.sum() * max(i, 1) - taken
        assert blend[i][0] == behind.argmax()
        taken[behind.argmax()] += 1


def test_a_list_is_blended_by_size(tmp_path):
    small, large = (write_tokens(tmp_path / str(i), mark(i, n)) for i, n in ((0, 100), (1, 300)))
    blend = open_dataset([small, large], 16, SEED, 400)
    assert sum(blend[i][0] for i in range(400)) == 300


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(tmp_path, weight):
    prefix = write_tokens(tmp_path / "a", mark(0, 3))
    with pytest.raises(ValueError, match=r"its weight .* in the blend is not greater than 0"):
        open_dataset({prefix: 1.0, str(tmp_path / "b"): weight}, 16, SEED, 10)


def test_split_takes_the_last_documents(tmp_path):
    prefix = write_tokens(tmp_path / "x", [np.full(40, i) for i in range(100)])
    parts = {
        part: open_dataset(prefix, 8, SEED, 50, split=0.05, part=part)
        for part in ("train", "validation")
    }
    seen = {p: {t for i in range(len(d)) for t in d[i].tolist()} for p, d in parts.items()}
    assert seen == {"train": set(range(95)), "validation": set(range(95, 100))}


@pytest.mark.parametrize("count", [1, 7, 10, 99, 1001])
@pytest.mark.parametrize("split", [0.5, 0.05, 0.001, 0.25])
def test_split_rounds_as_gpt_neox(count, split):
    """gpt-neox: cumulative rounded shares, all shifted by what they miss the count by."""
    ends = np.cumsum([round((1 - split) * count), round(split * count)])
    ends -= ends[-1] - count
    assert split_documents(count, split, "train") == range(int(ends[0]))
    assert split_documents(count, split, "validation") == range(int(ends[0]), count)


def test_the_hash_names_what_a_run_reads(tmp_path):
    documents = random_documents(100)
    prefix = write_tokens(tmp_path / "x", documents)
    same = open_dataset(write_tokens(tmp_path / "copy", documents), 16, SEED, 50)
    first = open_dataset(prefix, 16, SEED, 50)
    assert first.order_hash(20) == same.order_hash(20)
    assert first.identity() == same.identity()
    others = [open_dataset(prefix, 16, SEED + 1, 50), open_dataset(prefix, 15, SEED, 50)]
    documents[3] = documents[3] ^ 1
    others.append(open_dataset(write_tokens(tmp_path / "y", documents), 16, SEED, 50))
    hashes = {dataset.order_hash(len(dataset)) for dataset in [first, *others]}
    assert len(hashes) == 4


@pytest.mark.parametrize("order", ["neox", "megatron"])
def test_fewer_tokens_than_a_sample_are_refused(tmp_path, order):
    prefix = write_tokens(tmp_path / "x", [np.arange(16)])
    with pytest.raises(
        ValueError, match=r"16 tokens in 1 documents are fewer than one sample of 16 \+ 1"
    ):
        open_dataset(prefix, 16, SEED, 1, order)
    assert len(open_dataset(prefix, 15, SEED, 1, order)) >= 1


def test_rows_of_another_length_or_too_few_are_refused(tmp_path):
    prefix = write_tokens(tmp_path / "x", [np.arange(17)] * 5 + [np.arange(16)])
    with pytest.raises(ValueError, match=r"row 5 has 16 tokens, .* needs sequence_length"):
        open_dataset(prefix, 16, SEED, 1, "preshuffled")
    prefix = write_tokens(tmp_path / "y", [np.arange(17)] * 5)
    with pytest.raises(ValueError, match="5 rows are fewer than the 6 samples"):
        open_dataset(prefix, 16, SEED, 6, "preshuffled")


def test_unknown_orders_are_refused(tmp_path):
    prefix = write_tokens(tmp_path / "x", [np.arange(100)])
    with pytest.raises(ValueError, match="choose one of neox, megatron, preshuffled"):
        open_dataset(prefix, 16, SEED, 1, "random")


def test_samples_out_of_range_are_an_index_error(tmp_path):
    opened = open_dataset(write_tokens(tmp_path / "x", [np.arange(100)]), 16, SEED, 1)
    for i in (-1, len(opened)):
        with pytest.raises(IndexError):
            opened[i]


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("change", ["longer", "same size"])
def test_files_that_are_written_to_while_they_are_read(tmp_path, ending, change) -> None:
    """Other numbers than those the run began with: never a batch of them."""
    prefix = write_tokens(tmp_path / "x", random_documents(50))
    samples = open_dataset(prefix, 16, seed=1, samples=20)
    first = samples[3]
    with open(f"{prefix}.{ending}", "r+b" if change == "same size" else "ab") as file:
        file.write(b"\1\1")
    os.utime(f"{prefix}.{ending}", ns=(0, 10**18))  # the clock of a disk may be coarse
    with pytest.raises(ValueError, match=rf"x\.{ending}: was written to while it was read"):
        samples[3]
    assert len(first) == 17


def test_files_that_are_replaced_are_read_on(tmp_path) -> None:
    """Prepared anew under the same name: who has opened the old ones reads them to the end."""
    prefix = write_tokens(tmp_path / "x", random_documents(50))
    samples = open_dataset(prefix, 16, seed=1, samples=20)
    first = samples[3]
    other = write_tokens(tmp_path / "y", random_documents(50, seed=1))
    for ending in ("bin", "idx"):
        os.replace(f"{other}.{ending}", f"{prefix}.{ending}")
    np.testing.assert_array_equal(samples[3], first)
