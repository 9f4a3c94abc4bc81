"""The softmax over a chunk of logits as Triton kernels: the gradient takes the logits' place.

One pass reads the logits for their peak and the sum of their exponentials, a second reads them and
writes the gradient: 6 bytes a logit in bf16. Arithmetic is float32 whatever the logits' dtype.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8
BLOCK = 32 * WARPS  # threads; each takes VECTOR neighbouring logits, 16 bytes of bf16, at a time

VECTOR = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # finite: a difference of two is 0, not NaN


@triton.jit
def _columns(start, BLOCK: tl.constexpr):
    """[BLOCK, VECTOR], a thread's neighbours in one row."""
    return start + tl.arange(0, BLOCK)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load(logits, columns, rows, vocabulary):
    """Logits in float32, -inf where they take no part. Whole rows are loaded: their number is a
    multiple of 16, so that 16 bytes can be read at once, and the vocabulary need not be."""
    x = tl.load(logits + columns, mask=columns < rows, other=0.0).to(tl.float32)
    return tl.where(columns < vocabulary, x, -float("inf"))


@triton.jit
def normaliser_kernel(
    logits_pointer,
    labels_pointer,
    peak_pointer,
    sum_pointer,
    target_pointer,
    rows,
    vocabulary,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    logits = logits_pointer + token * rows
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK * VECTOR):
        columns = _columns(start, BLOCK)
        x = _load(logits, columns, rows, vocabulary)
        higher = tl.maximum(peak, tl.max(x, 1))
        total *= tl.exp2((peak - higher) * LOG2_E)
        total += tl.sum(tl.exp2((x - higher[:, None]) * LOG2_E), 1)
        peak = higher
    highest = tl.max(peak)
    tl.store(peak_pointer + token, highest)
    tl.store(sum_pointer + token, tl.sum(total * tl.exp2((peak - highest) * LOG2_E)))
    label = tl.load(labels_pointer + token)
    mine = (label >= 0) & (label < vocabulary)
    tl.store(target_pointer + token, tl.load(logits + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(
    logits_pointer,
    labels_pointer,
    peak_pointer,
    sum_pointer,
    rows,
    vocabulary,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    logits = logits_pointer + token * rows
    label = tl.load(labels_pointer + token)
    peak = tl.load(peak_pointer + token)
    share = 1.0 / tl.load(sum_pointer + token)
    for start in range(0, rows, BLOCK * VECTOR):
        columns = _columns(start, BLOCK)
        x = _load(logits, columns, rows, vocabulary)
        gradient = tl.exp2((x - peak) * LOG2_E) * share
        gradient -= tl.where(columns == label, 1.0, 0.0)
        tl.store(
            logits + columns, gradient.to(logits_pointer.dtype.element_ty), mask=columns < rows
        )


def softmax(
    logits: Tensor,
    targets: Tensor,
    vocabulary: int,
    group: dist.ProcessGroup | None,
    wants_gradient: bool = True,
) -> Tensor:
    """Loss of each token [tokens]; its gradient by the logits is written in their place.

    logits: [tokens, rows], of which the first `vocabulary` take part; targets: [tokens], the
    label's row in this shard, outside [0, rows) where another rank has it. No group: the rows are
    whole.
    """
    tokens, rows = logits.shape
    peak, total, target = logits.new_empty(3, tokens, dtype=torch.float32)
    targets = targets.contiguous()
    with torch.cuda.device_of(logits):
        normaliser_kernel[(tokens,)](
            logits, targets, peak, total, target, rows, vocabulary, BLOCK=BLOCK, num_warps=WARPS
        )
        if group is not None and dist.get_world_size(group) > 1:
            _join(peak, total, target, group)
        if wants_gradient:
            gradient_kernel[(tokens,)](
                logits, targets, peak, total, rows, vocabulary, BLOCK=BLOCK, num_warps=WARPS
            )
    return total.log() + (peak - target)


def _join(peak: Tensor, total: Tensor, target: Tensor, group: dist.ProcessGroup) -> None:
    """From every shard's peak, sum of exponentials and target logit (or 0), the whole row's."""
    shard_peak = peak.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    sums = torch.stack(((shard_peak - peak).exp_().mul_(total), target))
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    total.copy_(sums[0])
    target.copy_(sums[1])
