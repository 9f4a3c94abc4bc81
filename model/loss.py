"""Cross-entropy over a large, possibly sharded vocabulary, without ever holding all logits.

The tokens pass in chunks. Each chunk's logits are computed once: the loss and both gradients
are taken from them at once, in the forward pass, and the logits are dropped. The softmax is
float32 whatever the model's dtype.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Float32 logits held at a time, in bytes: in a CPU's cache, or enough to fill a GPU.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, group: dist.ProcessGroup
) -> Tensor:
    """Mean cross-entropy of softmax(hidden weight^T) against the labels: a float32 scalar, nats.

    hidden: [tokens, hidden], the same on every rank of `group`; weight: [rows, hidden], this
    rank's rows of the output embedding; labels: [tokens], each in [0, vocab_size). Rows past
    `vocab_size` take no part. The gradient of `hidden` is this rank's share: the sum over the
    group is the whole.
    """
    # Asked here: inside an autograd function gradients always look switched off.
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(hidden, weight, labels, vocab_size, group, wants_gradient)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        wants_gradient: bool,
    ) -> Tensor:
        first_row = dist.get_rank(group) * weight.shape[0]
        padding = slice(max(vocab_size - first_row, 0), None)
        tokens, chunk_tokens = hidden.shape[0], _chunk_tokens(weight)
        if wants_gradient:
            hidden_gradient = torch.empty_like(hidden)
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Two buffers for all chunks (one in float32): new memory each time costs page faults.
        product = hidden.new_empty(min(chunk_tokens, tokens), weight.shape[0])
        logits = product.float()
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, tokens))
            used = slice(0, chunk.stop - start)
            torch.mm(hidden[chunk], weight.t(), out=product[used])
            logits[used].copy_(product[used])
            logits[used, padding] = -torch.inf
            losses, gradient = _softmax(logits[used], labels[chunk] - first_row, group)
            total += losses.sum()
            if wants_gradient:
                gradient = product[used].copy_(gradient)
                torch.mm(gradient, weight, out=hidden_gradient[chunk])
                _add_product(weight_gradient, gradient.t(), hidden[chunk])
        if wants_gradient:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
            ctx.weight_dtype = weight.dtype
        ctx.tokens = tokens
        return total / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        # The mean's 1 / tokens comes in only here, beside the loss scale, so that half-precision
        # gradients do not underflow.
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradient / ctx.tokens
        hidden_gradient = hidden_gradient.mul_(scale)
        weight_gradient = weight_gradient.mul_(scale).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None, None, None


def _softmax(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Loss of each token [tokens] and its gradient by the logits [tokens, rows], in their place.

    targets: [tokens], the label's row in this shard, outside [0, rows) where another rank has it.
    """
    rows = logits.shape[-1]
    mine = (targets >= 0) & (targets < rows)
    targets = torch.where(mine, targets, 0).unsqueeze(-1)
    peak = _all_reduce(logits.amax(-1, keepdim=True), dist.ReduceOp.MAX, group)
    shifted = logits.sub_(peak)
    target = torch.where(mine, shifted.gather(-1, targets).squeeze(-1), 0.0)
    exponentials = shifted.exp_()
    normaliser, target = _all_reduce(
        torch.stack((exponentials.sum(-1), target)), dist.ReduceOp.SUM, group
    )
    gradient = exponentials.div_(normaliser.unsqueeze(-1))
    gradient.scatter_add_(-1, targets, -mine.float().unsqueeze(-1))
    return normaliser.log() - target, gradient


def _all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType, group) -> Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, operation, group)
    return tensor


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, where the total is float32 and the factors may be narrower."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunk_tokens(weight: Tensor) -> int:
    tokens = max(1, CHUNK_BYTES[weight.device.type] // (4 * weight.shape[0]))
    return tokens - tokens % 64 if tokens > 64 else tokens
