"""Every collective of the method. Process groups are handed in; None means not sharded."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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

    def sum_data(self, values: Tensor) -> Tensor:
        """Sum `values`, in place, over the data-parallel ranks."""
        if self.data_size > 1:
            dist.all_reduce(values, group=self.data_group)
        return values

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum `values`, in place, over the tensor-parallel ranks."""
        if self.tensor_size > 1:
            dist.all_reduce(values, group=self.tensor_group)
        return values

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


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)
