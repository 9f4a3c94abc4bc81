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
            logits[used, padding] = torch.finfo(logits.dtype).min
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
    mine = (targets >= 0) & (targets < logits.shape[-1])
    targets = torch.where(mine, targets, 0).unsqueeze(-1)
    target = torch.where(mine, logits.gather(-1, targets).squeeze(-1), 0.0)
    peak = logits.amax(-1)
    softmax = torch.softmax(logits, -1, out=logits)
    # log sum exp(logits): the largest entry's logit less its log-probability.
    normaliser = peak - softmax.amax(-1).log()
    if dist.get_world_size(group) > 1:
        shard = normaliser
        normaliser, target = _join(shard, target, group)
        softmax.mul_((shard - normaliser).exp_().unsqueeze(-1))
    gradient = softmax.scatter_add_(-1, targets, -mine.float().unsqueeze(-1))
    return normaliser - target, gradient


def _join(normaliser: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """From every shard's log sum of exponentials and target logit (or 0), the whole row's."""
    peak = normaliser.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    sums = torch.stack(((normaliser - peak).exp_(), target))
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return peak + sums[0].log(), sums[1]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, where the total is float32 and the factors may be narrower."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunk_tokens(weight: Tensor) -> int:
    tokens = max(1, CHUNK_BYTES[weight.device.type] // (4 * weight.shape[0]))
    return tokens - tokens % 64 if tokens > 64 else tokens
