"""Tensor-parallel linears and embeddings: the one place of the model that knows megatron-core.

Every layer here must be built after `megatron.core.parallel_state` was initialised. Where the
tensor-parallel group has one rank there is nothing to exchange, and a layer is torch's own
operation with its fused bias. Parameters that are sharded carry `tensor_model_parallel = True`
and `partition_dim`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
from torch import Tensor, nn

# megatron-core's mark on replicated parameters that see only a part of the sequence.
SEQUENCE_PARALLEL = "sequence_parallel"

Initializer = Callable[[Tensor], Tensor]


def tensor_parallel_size() -> int:
    """Number of ranks that share one copy of each sharded matrix."""
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_parallel_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def tensor_parallel_group() -> torch.distributed.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def _megatron_config(sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor_parallel_size(),
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )


class _PlainStateDict(nn.Module):
    """Takes megatron-core's `_extra_state` (always None) out of the state dict."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()


class ColumnLinear(_PlainStateDict, tensor_parallel.ColumnParallelLinear):
    """x -> x W^T + b with W's rows (the outputs) sharded.

    [sequence, batch, inputs] -> [sequence, batch, outputs / TP]; under sequence parallelism the
    input holds this rank's part of the sequence, the output all of it.
    """

    weight: Tensor
    bias: Tensor | None
    sequence_parallel: bool

    def __init__(
        self,
        inputs: int,
        outputs: int,
        init: Initializer,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
    ):
        super().__init__(
            inputs,
            outputs,
            config=_megatron_config(sequence_parallel),
            init_method=init,
            bias=bias,
            skip_bias_add=True,
        )
        self.is_sharded = tensor_parallel_size() > 1

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        return super().forward(x)[0] if self.is_sharded else F.linear(x, self.weight)

    def forward(self, x: Tensor, bias_apart: bool = False) -> Any:
        """x W^T + b; with `bias_apart` the two terms, for who adds them in a pass of its own.

        ZeRO-3 has the parameters here only while this runs, or if they are what it returns.
        """
        if bias_apart:
            return self.product(x), self.bias
        if not self.is_sharded:
            return F.linear(x, self.weight, self.bias)
        product = self.product(x)
        return product if self.bias is None else product + self.bias


class RowLinear(_PlainStateDict, tensor_parallel.RowParallelLinear):
    """x -> x W^T + b with W's columns (the inputs) sharded; the bias is on every rank.

    [sequence, batch, inputs / TP] -> [sequence, batch, outputs]; under sequence parallelism the
    output holds this rank's part of the sequence.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, inputs: int, outputs: int, init: Initializer, *, sequence_parallel: bool = False
    ):
        super().__init__(
            inputs,
            outputs,
            config=_megatron_config(sequence_parallel),
            init_method=init,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        self.is_sharded = tensor_parallel_size() > 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_sharded:
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)[0]


class TokenEmbedding(tensor_parallel.VocabParallelEmbedding):
    """[batch, sequence] -> [sequence, batch, hidden], or this rank's part of the sequence."""

    def __init__(
        self, rows: int, hidden: int, init: Initializer, *, sequence_parallel: bool = False
    ):
        super().__init__(
            rows,
            hidden,
            init_method=init,
            reduce_scatter_embeddings=sequence_parallel,
            config=_megatron_config(sequence_parallel),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        # With reduce_scatter_embeddings megatron-core itself puts the sequence first.
        return super().forward(tokens if self.reduce_scatter_embeddings else tokens.t())


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the hidden channels, marked where its gradients need a sum over TP."""

    def __init__(self, hidden: int, epsilon: float, *, sequence_parallel: bool = False):
        super().__init__(hidden, eps=epsilon)
        for parameter in self.parameters():
            setattr(parameter, SEQUENCE_PARALLEL, sequence_parallel)


def reduce_sequence_parallel_gradients(model: nn.Module) -> int:
    """Sums the gradients of norms and row biases over TP, in a hook on each; returns how many.

    Under sequence parallelism each rank sees only its part of the sequence in these replicated
    parameters, and the data-parallel engine does not know it. Call once, before the first
    backward pass; without sequence parallelism it registers nothing.
    """
    group = tensor_parallel_group()

    def all_reduce(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, group=group)
        return gradient

    marked = [p for p in model.parameters() if getattr(p, SEQUENCE_PARALLEL, False)]
    for parameter in marked:
        parameter.register_hook(all_reduce)
    return len(marked)


def whole_sequence(hidden: Tensor, *, sequence_parallel: bool) -> Tensor:
    """[sequence or its part, batch, hidden] -> [sequence, batch, hidden] on every TP rank.

    Its backward sums over TP the gradients that the ranks' vocabulary shards contribute.
    """
    if sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(hidden)
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)


def whole_vocabulary(logits: Tensor) -> Tensor:
    """[..., rows / TP] -> [..., rows] on every TP rank: each adds its shard into zeros."""
    size, rank, rows = tensor_parallel_size(), tensor_parallel_rank(), logits.shape[-1]
    if size == 1:
        return logits
    padded = F.pad(logits, (rank * rows, (size - 1 - rank) * rows))
    return tensor_parallel.reduce_from_tensor_model_parallel_region(padded)
