"""In which order a corpus is read.

Documents are shuffled and laid end to end, epoch after epoch, as one stream of tokens. Sample i
of the stream is its tokens [i*length, (i+1)*length + 1): samples overlap by one token, which is
the last label of one and the first input of the next. Then the samples are shuffled. All of it
is NumPy's `RandomState(seed)`, whose numbers never change, and nothing depends on ranks.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
    """`documents` [visits] in the stream's order, the token each of them `starts` at
    [visits + 1], and the shuffled `samples` [samples]."""

    documents: np.ndarray
    starts: np.ndarray
    samples: np.ndarray


def neox(documents: range, lengths: np.ndarray, length: int, seed: int, samples: int) -> Order:
    """gpt-neox 1.0, which trained Pythia: all epochs are shuffled together.

    Args:
        documents: the documents of this part of the corpus.
        lengths: tokens of every document of the corpus [all documents].
        length: sequence length L; a sample has L + 1 tokens.
        samples: how many are wanted; as many whole epochs are laid out as give that many.
    """
    random = np.random.RandomState(seed)
    epochs = count_epochs(count_tokens(documents, lengths), length, samples)
    return _cut(_shuffled(documents, epochs, random), lengths, length, _shuffle_all, random)


def megatron(documents: range, lengths: np.ndarray, length: int, seed: int, samples: int) -> Order:
    """megatron-core's GPTDataset: where less than 80 % of the last epoch is wanted, it is
    shuffled by itself and read last, so that the epochs before it are read whole."""
    random = np.random.RandomState(seed)
    tokens = count_tokens(documents, lengths)
    epochs = count_epochs(tokens, length, samples)
    whole = ((epochs - 1) * tokens - 1) // length  # samples before the last epoch
    if epochs == 1 or samples - whole >= int(0.8 * ((tokens - 1) // length)):
        return _cut(_shuffled(documents, epochs, random), lengths, length, _shuffle_all, random)

    def shuffle(numbers: np.ndarray, random: np.random.RandomState) -> None:
        random.shuffle(numbers[:whole])
        random.shuffle(numbers[whole:])

    visits = [_shuffled(documents, epochs - 1, random), _shuffled(documents, 1, random)]
    return _cut(np.concatenate(visits), lengths, length, shuffle, random)


ORDERS: dict[str, Callable[..., Order]] = {"neox": neox, "megatron": megatron}


def count_epochs(tokens: int, length: int, samples: int) -> int:
    """The fewest epochs of `tokens` tokens that hold so many samples of `length` + 1."""
    return -(-(samples * length + 1) // tokens)


def count_tokens(documents: range, lengths: np.ndarray) -> int:
    """Tokens of this part of the corpus."""
    return int(lengths[documents.start : documents.stop].sum(dtype=np.int64))


def _shuffled(documents: range, epochs: int, random: np.random.RandomState) -> np.ndarray:
    """The documents of so many epochs, shuffled together [epochs * documents], int32."""
    visits = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs)
    random.shuffle(visits)
    return visits


def _shuffle_all(numbers: np.ndarray, random: np.random.RandomState) -> None:
    random.shuffle(numbers)


def _cut(
    visits: np.ndarray,
    lengths: np.ndarray,
    length: int,
    shuffle: Callable[[np.ndarray, np.random.RandomState], None],
    random: np.random.RandomState,
) -> Order:
    """Cut the stream of visited documents into samples, and shuffle those."""
    starts = np.zeros(len(visits) + 1, np.int64)
    np.cumsum(lengths[visits], out=starts[1:])
    count = int(starts[-1] - 1) // length
    samples = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
    shuffle(samples, random)
    return Order(visits, starts, samples)
