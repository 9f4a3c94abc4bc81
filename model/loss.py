"""Cross-entropy over a large, possibly sharded vocabulary, without ever holding all logits.

The tokens pass in chunks. Each chunk's logits are computed once: the loss and both gradients
are taken from them at once, in the forward pass, and the logits are dropped. The softmax is
float32 whatever the model's dtype: plain torch operations on float32 copies of a few rows, or on a
GPU Triton kernels that need none (`model.triton_loss`).
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from l2e.problems import first_line

# Logits held at a time, in bytes: so many that adding up the chunks' gradients of the weight is
# little beside reading the logits.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
# Of these the plain softmax works on so many in float32 at a time: on a CPU its passes find them in
# the cache of one core.
SLICE_BYTES = {"cpu": 2**20, "cuda": 2**28}

# (logits [tokens, rows], targets [tokens], vocabulary, group, wants_gradient) -> losses [tokens];
# puts the gradient in the place of the logits. No group: the rows are whole.
Softmax = Callable[[Tensor, Tensor, int, dist.ProcessGroup | None, bool], Tensor]


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
        vocabulary = min(max(vocab_size - first_row, 0), weight.shape[0])  # of this shard
        tokens, fused = hidden.shape[0], fused_softmax(hidden.device, hidden.dtype, group)
        chunk_tokens = min(_chunk_tokens(weight, hidden.element_size()), tokens)
        # One or two buffers for all chunks: new memory each time costs page faults.
        product = hidden.new_empty(chunk_tokens, weight.shape[0])
        softmax = fused or _PlainSoftmax(product, group)
        if wants_gradient:
            hidden_gradient = torch.empty_like(hidden)
            weight_gradient = torch.empty_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, tokens))
            logits = product[: chunk.stop - start]
            torch.mm(hidden[chunk], weight.t(), out=logits)
            targets = labels[chunk] - first_row
            total += softmax(logits, targets, vocabulary, group, wants_gradient).sum()
            if wants_gradient:
                torch.mm(logits, weight, out=hidden_gradient[chunk])
                _add_product(weight_gradient, logits.t(), hidden[chunk], first=start == 0)
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


class _PlainSoftmax:
    """The softmax in torch operations, of a slice of the chunk after another, in float32."""

    def __init__(self, product: Tensor, group: dist.ProcessGroup) -> None:
        """`product` [tokens, rows] is as large as the chunks will be."""
        tokens, rows = product.shape
        self.is_sharded = dist.get_world_size(group) > 1
        held = SLICE_BYTES[product.device.type]
        if self.is_sharded:  # each slice takes messages
            held = CHUNK_BYTES[product.device.type] // 4
        self.slice_tokens = min(max(1, held // (torch.float32.itemsize * rows)), tokens)
        self.copy = None
        if product.dtype != torch.float32:
            self.copy = product.new_empty(self.slice_tokens, rows, dtype=torch.float32)

    def __call__(
        self,
        product: Tensor,
        targets: Tensor,
        vocabulary: int,
        group: dist.ProcessGroup | None,
        wants_gradient: bool,
    ) -> Tensor:
        """targets: outside [0, rows) where another rank has the label's row."""
        product[:, vocabulary:] = torch.finfo(product.dtype).min
        mine = (targets >= 0) & (targets < product.shape[-1])
        targets = torch.where(mine, targets, 0).unsqueeze(-1)
        target = torch.where(mine, product.gather(-1, targets).squeeze(-1).float(), 0.0)
        minus_one = -mine.float().unsqueeze(-1)
        normaliser = torch.empty_like(target)
        for start in range(0, len(product), self.slice_tokens):
            part = slice(start, start + self.slice_tokens)
            logits = product[part]
            if self.copy is not None:
                logits = self.copy[: len(logits)].copy_(logits)
            peak = logits.amax(-1)
            softmax = torch.softmax(logits, -1, out=logits)
            # log sum exp(logits): the largest entry's logit less its log-probability.
            torch.sub(peak, softmax.amax(-1).log_(), out=normaliser[part])
            if group is not None and self.is_sharded:
                shard = normaliser[part].clone()
                normaliser[part], target[part] = _join(shard, target[part], group)
                softmax.mul_((shard - normaliser[part]).exp_().unsqueeze(-1))
            if wants_gradient:
                gradient = softmax.scatter_add_(-1, targets[part], minus_one[part])
                if self.copy is not None:
                    product[part] = gradient
        return normaliser - target


@cache
def fused_softmax(
    device: torch.device, dtype: torch.dtype, group: dist.ProcessGroup
) -> Softmax | None:
    """Triton's softmax where every rank has a GPU and it agrees with float64; None elsewhere.

    A GPU that goes without says so once.
    """
    if device.type != "cuda":
        return None
    softmax: Softmax | None = None
    try:
        from model import triton_loss

        softmax = triton_loss.softmax
        problem = disagreement(softmax, device, dtype)
    except Exception as error:  # a compiler may fail in any way; training goes on without it
        problem = f"{type(error).__name__}: {first_line(error)}"
    fails = torch.tensor(float(problem is not None), device=device)
    if dist.get_world_size(group) > 1:  # the shards of a row must be handled alike
        dist.all_reduce(fails, group=group)
    if fails.item() == 0:
        return softmax
    reason = problem or "it fails on another rank"
    logging.getLogger("model").warning("loss: plain softmax, not Triton's (%s)", reason)
    return None


def disagreement(fused: Softmax, device: torch.device, dtype: torch.dtype) -> str | None:
    """How the fused softmax differs from float64 on random logits; None if by rounding alone."""
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(16, 5008, generator=generator)).to(device, dtype)
    targets = torch.randint(5000, (16,), generator=generator).to(device)
    exact = logits[:, :5000].double()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    # Not by autograd: this is asked inside an autograd function, where gradients are switched off.
    gradient = exact.softmax(-1) - torch.nn.functional.one_hot(targets, 5000)
    losses = fused(logits, targets, 5000, None, True)
    errors = {"loss": losses - wanted, "gradient": logits[:, :5000].double() - gradient}
    worst = {name: error.abs().max().item() for name, error in errors.items()}
    if worst["loss"] <= 1e-5 and worst["gradient"] <= 4 * torch.finfo(dtype).eps:
        return None
    return f"differs from float64 by {worst}"


def _join(normaliser: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """From every shard's log sum of exponentials and target logit (or 0), the whole row's."""
    peak = normaliser.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    sums = torch.stack(((normaliser - peak).exp_(), target))
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return peak + sums[0].log(), sums[1]


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left right (= for the first), where the total is float32 and the factors may be
    narrower; where the product can be had in float32, it is not rounded before it is added."""
    if right.dtype != total.dtype and _has_wide_products(right.device, right.dtype):
        if first:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(left, right, out_dtype=total.dtype)
        return
    if right.dtype != total.dtype:
        product = left @ right
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)


@cache
def _has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices of this dtype have a float32 product here: on a CPU they do not."""
    one = torch.ones(16, 16, device=device, dtype=dtype)
    wide = torch.empty(16, 16, device=device)
    try:
        torch.mm(one, one, out_dtype=wide.dtype, out=wide)
    except (RuntimeError, TypeError, ValueError):
        return False
    return bool((wide == 16).all())


def _chunk_tokens(weight: Tensor, element: int) -> int:
    """Tokens whose logits of `element` bytes fill a chunk."""
    tokens = max(1, CHUNK_BYTES[weight.device.type] // (element * weight.shape[0]))
    return tokens - tokens % 64 if tokens > 64 else tokens
