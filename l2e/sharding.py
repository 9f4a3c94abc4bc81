"""Every collective of the method. Process groups are handed in; None means not sharded."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

WORD = 4096


@dataclass(frozen=True)
class Sharding:
    """How the work is divided among processes.

    Attributes:
        data_group: the ranks that hold the same neurons and see other samples.
        tensor_group: the ranks that see the same samples and hold other neurons, in order.
    """

    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None

    @property
    def data_size(self) -> int:
        return _size(self.data_group)

    @property
    def data_rank(self) -> int:
        return _rank(self.data_group)

    @property
    def tensor_size(self) -> int:
        return _size(self.tensor_group)

    @property
    def tensor_rank(self) -> int:
        return _rank(self.tensor_group)

    def sum_data(self, tensors: list[Tensor]) -> None:
        """Sum contiguous `tensors`, in place, over the data-parallel ranks: in one all-reduce.

        Integers below 2^36 / 4,096 ranks stay exact.
        """
        _sum(tensors, self.data_group)

    def sum_tensor(self, tensors: list[Tensor]) -> None:
        """`sum_data`, over the tensor-parallel ranks."""
        _sum(tensors, self.tensor_group)

    def from_data_rank(self, rank: int, values: Tensor) -> Tensor:
        """One data-parallel rank's `values` (a new tensor)."""
        values = values.clone()
        if self.data_size > 1:
            dist.broadcast(values, group=self.data_group, group_src=rank)
        return values

    def gather_data(self, values: list[list[int]]) -> list[list[list[int]]]:
        """Every data-parallel rank's table of numbers, in the order of the ranks."""
        if self.data_size == 1:
            return [values]
        device = "cuda" if dist.get_backend(self.data_group) == "nccl" else "cpu"
        own = torch.tensor(values, device=device)
        tables = [torch.empty_like(own) for _ in range(self.data_size)]
        dist.all_gather(tables, own, group=self.data_group)
        return [table.tolist() for table in tables]

    def gather_neurons(self, values: Tensor) -> Tensor:
        """[..., neurons] of one shard -> [..., all neurons], in the order of the ranks."""
        if self.tensor_size == 1:
            return values
        shards = [torch.empty_like(values) for _ in range(self.tensor_size)]
        dist.all_gather(shards, values.contiguous(), group=self.tensor_group)
        return torch.cat(shards, dim=-1)

    def own_neurons(self, values: Tensor) -> Tensor:
        """[..., all neurons] -> this rank's shard [..., neurons]."""
        return values.chunk(self.tensor_size, dim=-1)[self.tensor_rank]


def to_words(counts: Tensor) -> Tensor:
    """int64 [n] -> float32 [2n] whose sums over up to 4,096 ranks are exact below 2^36."""
    return torch.cat([counts // WORD, counts % WORD]).float()


def from_words(words: Tensor) -> Tensor:
    """The int64 counts [n] of summed words [2n]."""
    high, low = words.long().chunk(2)
    return high * WORD + low


def _sum(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    if _size(group) == 1 or not tensors:
        return
    if len(tensors) == 1:
        dist.all_reduce(tensors[0], group=group)
        return
    whole = [not tensor.is_floating_point() for tensor in tensors]
    rows = [t.flatten() for t in tensors]
    rows = [to_words(row) if w else row for row, w in zip(rows, whole, strict=True)]
    flat = torch.cat(rows)
    dist.all_reduce(flat, group=group)
    parts = flat.split([len(row) for row in rows])
    parts = [from_words(part) if w else part for part, w in zip(parts, whole, strict=True)]
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
