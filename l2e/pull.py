"""L_MS of an output that stays the very tensor it is: only the selected entries are kept.

Observing and `regularize` change no activation, so what follows a module is given its own output.
L_MS's gradient is zero but for the selected entries, a sparse tensor, which autograd adds in place
to the gradient that arrives where nobody else holds that. `inhibition` does the same densely: on a
GPU, whose host would have to wait to learn how many entries are selected, in compiled graphs, and
where an output is a view or a leaf, whose place in the graph is not its own.
"""

import torch
from torch import Tensor

from l2e import inhibition, kernels
from l2e.state import LayerState


def serves(state: LayerState, z: Tensor) -> bool:
    """Whether `pull` can do in this pass what `inhibit` does."""
    every_entry_matters = state.config.scale_invariant or state.comparing
    return (
        state.config.method in ("none", "regularize")
        and z.device.type == "cpu"
        and not (every_entry_matters or torch.compiler.is_compiling())
        and not (z.requires_grad and (z.is_leaf or z._is_view()))
    )


def pull(
    z: Tensor, counted: Tensor | None, state: LayerState, neuron_dim: int, inject: bool
) -> Tensor:
    """Add a call to the layer's sums, and L_MS's gradient to that of `z`, which stays as it is.

    Args:
        z, counted, neuron_dim: `pre` and the others of `inhibition.inhibit`.
        inject: in z's own backward pass; otherwise in that of the returned loss.

    Returns:
        The sum over selected entries of log (z - mean)^2, a float32 scalar.
    """
    with torch.no_grad():
        loss, places, directions, rows = _observe(z.detach(), counted, state, neuron_dim)
    if not (torch.is_grad_enabled() and z.requires_grad and state.config.method == "regularize"):
        return loss
    anchor = z[(0,) * z.dim()].clone() if z.numel() else z.sum()

    def injected(ctx) -> Tensor | float:
        inhibition.inject_once(ctx, state)
        return state.phase.gradient_scale * state.loss_factor(rows)

    factor = injected if inject else None
    with torch.autograd._unsafe_preserve_version_counter(z):  # no value of it is changed
        return _Pull.apply(z, z, loss, places, directions, anchor, factor)[1]


class _Pull(torch.autograd.Function):
    """Gives z, which keeps its values, this place in its graph, and the loss the same.

    z comes twice, so that its gradient may go back in two parts, a sparse and a dense one.
    """

    @staticmethod
    def forward(ctx, z, _, loss, places, directions, anchor, factor):
        ctx.save_for_backward(places, directions, anchor)
        ctx.shape, ctx.dtype, ctx.factor = z.shape, z.dtype, factor
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(z)
        return z, loss.clone()

    @staticmethod
    def backward(ctx, grad, loss_grad):
        places, directions, anchor = ctx.saved_tensors
        factor = loss_grad if ctx.factor is None else ctx.factor(ctx)
        pull = None
        if factor is not None:
            values = (2 * factor * directions).to(ctx.dtype)
            pull = _sparse(places, values, ctx.shape)
            if grad is None or torch.is_grad_enabled():  # nothing dense to meet, or not in place
                pull = pull.to_dense()
            pull = _once(pull, anchor)
        return pull, grad, None, None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that has none of its own; `anchor` ties it to the graph of what it is of."""

    @staticmethod
    def forward(ctx, grad, anchor):
        return grad.clone()

    backward = staticmethod(inhibition.no_second_derivatives)


def _once(grad: Tensor, anchor: Tensor) -> Tensor:
    return _Once.apply(grad, anchor) if torch.is_grad_enabled() else grad


def _sparse(places: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """No place is there twice, which is all that adding it in place asks for."""
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False, is_coalesced=True)


def _observe(
    z: Tensor, counted: Tensor | None, state: LayerState, neuron_dim: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The loss; of each selected entry its place in z ([z.dim(), entries]) and half its slope;
    and how many rows counted."""
    moved = z.movedim(neuron_dim, -1)
    rows = inhibition.as_rows(moved, state)
    kept = None
    if counted is not None:
        kept = inhibition.kept_rows(counted, moved, neuron_dim, state)
        rows = rows[kept]
    if len(rows) == 0:
        nothing = torch.empty(0, dtype=torch.float32)
        return nothing.sum(), nothing.long().view(z.dim(), 0), nothing, 0
    sequence = inhibition.rows_of_sequence(moved, kept, state)
    arguments, _ = inhibition.prepare(state, rows, None, sequence)
    sums = None if inhibition.in_backward() else torch.zeros_like(state.core_sums)
    entries, directions, logs = kernels.observe(rows, arguments, sums)
    loss = logs.sum() if sums is None else inhibition.record(state, rows, arguments, sums)
    if kept is not None:
        entries = kept[entries // state.neurons] * state.neurons + entries % state.neurons
    places: list[Tensor] = []
    for size in reversed(moved.shape):
        places.insert(0, entries % size)
        entries = entries // size
    places.insert(neuron_dim % z.dim(), places.pop())
    return loss, torch.stack(places), directions, len(rows)
