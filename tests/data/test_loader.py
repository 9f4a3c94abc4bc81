"""Steps are the same tokens whatever the ranks, the micro-batches and the first step."""

import numpy as np
import pytest
import torch

from data.dataset import open_dataset
from data.loader import batches, prefetch
from tests.data.conftest import random_documents, write_tokens

GLOBAL = 8
STEPS = 6


@pytest.fixture
def dataset(tmp_path):
    prefix = write_tokens(tmp_path / "x", random_documents(200))
    return open_dataset(prefix, 16, 1234, GLOBAL * STEPS)


def step_tokens(dataset, step: int, size: int, micro: int) -> torch.Tensor:
    """The global batch [global, length + 1] of a step, put together from all its ranks."""
    rows = []
    for rank in range(size):
        loader = batches(dataset, step * GLOBAL, GLOBAL, micro, rank, size)
        rows += [next(loader) for _ in range(GLOBAL // size // micro)]
    return torch.cat(rows)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_any_layout_reads_the_same_step(dataset, size, micro):
    for step in range(STEPS):
        expected = np.stack([dataset[i] for i in range(GLOBAL * step, GLOBAL * (step + 1))])
        found = step_tokens(dataset, step, size, micro)
        assert found.dtype == torch.int64
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("before", "after"), [((1, 4), (4, 1)), ((4, 2), (2, 2)), ((2, 1), (1, 8))]
)
def test_resuming_on_other_ranks_changes_nothing(dataset, before, after):
    """The bytes of the steps of a run stopped after step 2, against one that was never stopped."""
    whole = [step_tokens(dataset, step, 1, GLOBAL) for step in range(STEPS)]
    resumed = [
        step_tokens(dataset, step, *(before if step < 3 else after)) for step in range(STEPS)
    ]
    assert [t.numpy().tobytes() for t in whole] == [t.numpy().tobytes() for t in resumed]


def test_another_batch_size_goes_on_at_the_next_unread_sample(dataset):
    """Two steps of 8, then steps of 6 over 3 ranks: every sample once, in the same order."""
    rows = [step_tokens(dataset, step, 2, 2) for step in range(2)]
    loaders = [batches(dataset, 2 * GLOBAL, 6, 1, rank, 3) for rank in range(3)]
    for _ in range(4):
        rows += [torch.cat([next(loader), next(loader)]) for loader in loaders]
    expected = np.stack([dataset[i] for i in range(2 * GLOBAL + 4 * 6)])
    np.testing.assert_array_equal(torch.cat(rows), expected)


def test_ends_after_the_last_whole_step(dataset):
    steps = len(dataset) // GLOBAL
    assert len(list(batches(dataset, 0, GLOBAL, 2, 1, 2))) == steps * 2
    assert not list(batches(dataset, steps * GLOBAL, GLOBAL, 1))


def test_batch_that_doesnt_divide_is_refused(dataset):
    with pytest.raises(ValueError, match=r"train\.global_batch_size 8 is not a multiple"):
        next(batches(dataset, 0, 8, 3))


@pytest.mark.parametrize("ahead", [1, 2, 100])
def test_prefetching_changes_no_batch(dataset, ahead):
    plain = list(batches(dataset, GLOBAL, GLOBAL, 2))
    ahead_of_time = list(prefetch(batches(dataset, GLOBAL, GLOBAL, 2), ahead))
    assert len(ahead_of_time) == len(plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, ahead_of_time, strict=True))


def test_prefetching_reads_before_it_is_asked_and_no_further():
    read = []
    source = (read.append(number) or torch.tensor(number) for number in range(10))
    stream = prefetch(source, ahead=3)
    assert next(stream) == 0
    stream.close()  # waits for what is being read
    assert read == [0, 1, 2, 3]


def test_what_fails_while_prefetching_is_raised():
    def broken():
        yield torch.zeros(1)
        raise ValueError("the disk went away")

    stream = prefetch(broken())
    next(stream)
    with pytest.raises(ValueError, match="the disk went away"):
        next(stream)
