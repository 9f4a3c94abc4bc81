"""Training sets as micro-batches: which rank reads which rows of a step."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from data.dataset import Samples

if TYPE_CHECKING:
    import torch


def batches(
    dataset: Samples,
    first: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
) -> Iterator["torch.Tensor"]:
    """Micro-batches [micro_batch_size, sequence_length + 1], int64, of one data-parallel rank.

    `first` is the sample of the training set to begin with, and each step is the next
    `global_batch_size` of them. Each of the `data_size` ranks takes a contiguous slice of these
    and cuts it into micro-batches, so neither the number of ranks nor the micro-batch changes what
    a step sees, and any sample can be the first. Ends after the last whole step.
    """
    import torch  # here, since preparing text does without it

    if global_batch_size % (micro_batch_size * data_size):
        raise ValueError(
            f"train.global_batch_size {global_batch_size} is not a multiple of "
            f"train.micro_batch_size {micro_batch_size} x {data_size} data-parallel ranks"
        )
    rows = global_batch_size // data_size
    for step in range(first, len(dataset) - global_batch_size + 1, global_batch_size):
        own = step + data_rank * rows
        for row in range(own, own + rows, micro_batch_size):
            samples = [dataset[i] for i in range(row, row + micro_batch_size)]
            yield torch.from_numpy(np.stack(samples))


def prefetch(
    source: Iterator["torch.Tensor"], ahead: int = 2, pin: bool = False
) -> Iterator["torch.Tensor"]:
    """The same batches, `ahead` of them read in a thread before they are asked for.

    With `pin` they lie in pinned memory, from which a GPU copies without the host waiting.
    """

    def read() -> "torch.Tensor | None":
        batch = next(source, None)
        return batch.pin_memory() if pin and batch is not None else batch

    with ThreadPoolExecutor(1, "prefetch") as reader:
        waiting = deque(reader.submit(read) for _ in range(ahead))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(read))
            yield batch
