"""The method behind a module's output at the cost of its selected entries, of which alone is kept.

Observing and `regularize` change no activation, so what follows a module is given its own output;
`deactivate` gives a copy, other in the selected entries. What either adds to the gradient is zero
but for these, a sparse tensor, which autograd adds in place to the gradient that arrives where
nobody else holds that. Where the non-linearity is the layer's own, `activated` is both at once, and
writes into the gradient of that. `inhibition` does the same densely: on a GPU, whose host would
have to wait to learn how many entries are selected, in compiled graphs, and where an output is a
view or a leaf, whose place in the graph is not its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from l2e import inhibition, kernels
from l2e.state import LayerState


def serves(state: LayerState, z: Tensor) -> bool:
    """Whether `pull` can do in this pass what `inhibit` does."""
    return (
        state.config.method in ("none", "regularize", "deactivate")
        and state.config.kernels == "auto"
        and z.device.type == "cpu"
        and z.numel() < 2**31  # entries are numbered so
        and not (state.config.scale_invariant or torch.compiler.is_compiling())
    )


def may_replace(z: Tensor) -> bool:
    """Whether z may get another place in its graph."""
    return not (z.requires_grad and (z.is_leaf or z._is_view()))


def pull(
    z: Tensor, counted: Tensor | None, state: LayerState, neuron_dim: int, inject: bool
) -> tuple[Tensor, Tensor]:
    """Add a call to the layer's sums, and what the method adds to the gradient of `z`.

    Args:
        z: [..., units], the activations, behind the non-linearity.
        counted, neuron_dim: as of `inhibition.inhibit`.
        inject: L_MS's gradient in z's own backward pass; otherwise in that of the returned loss.

    Returns:
        What takes the place of z: itself, as it is, unless the method is "deactivate"; and the sum
        over selected entries of log (z - mean)^2, a float32 scalar.
    """
    with torch.no_grad():
        entries, values, logs, rows = _observe(z.detach(), counted, state, neuron_dim)
        loss = torch.tensor(logs, dtype=torch.float32, device=z.device)
    method, gradients = state.config.method, torch.is_grad_enabled() and z.requires_grad
    if method == "none" or rows == 0 or (method == "regularize" and not gradients):
        return z, loss
    anchor = z[(0,) * z.dim()].clone()
    if method == "deactivate":
        delta = state.config.delta
        return _Deactivated.apply(z, z, entries, values, anchor, delta, neuron_dim), loss
    call = _Call(state, counted, neuron_dim, rows, inject)
    with torch.autograd._unsafe_preserve_version_counter(z):  # no value of it is changed
        return _Regularized.apply(z, z, loss, entries, values, anchor, call)


class _Call(NamedTuple):
    """Of a call's backward pass; `pull`'s arguments, and how many rows counted."""

    state: LayerState
    counted: Tensor | None
    neuron_dim: int
    rows: int
    inject: bool

    def factor(self, ctx, loss_grad: Tensor | None) -> Tensor | float | None:
        """Of the gradient of the loss; None without one."""
        if not self.inject:
            return loss_grad
        inhibition.inject_once(ctx, self.state)
        return self.state.phase.gradient_scale * self.state.loss_factor(self.rows)

    def compare(
        self, ctx, grad: Tensor | None, directions: Tensor, factor: Tensor | float | None
    ) -> None:
        """Tell the state of the gradient that arrives, and of the one that is added."""
        arrived = directions.new_zeros(())
        if grad is not None:
            inhibition.compare_once(ctx, self.state)
            moved = grad.detach().movedim(self.neuron_dim, -1)
            rows = moved.reshape(-1, self.state.neurons)
            if self.counted is not None:
                rows = rows[inhibition.kept_rows(self.counted, moved, self.neuron_dim, self.state)]
            arrived = inhibition.sum_of_squares(rows)
        squares = torch.stack([arrived, directions.square().sum()])
        self.state.compare(squares, 0.0 if factor is None else factor)


class _Regularized(torch.autograd.Function):
    """Gives z, which keeps its values, this place in its graph, and the loss the same.

    z comes twice, here and below, so that its gradient may go back in two parts, a sparse and a
    dense one.
    """

    @staticmethod
    def forward(ctx, z, _, loss, entries, directions, anchor, call):
        ctx.save_for_backward(entries, directions, anchor)
        ctx.shape, ctx.dtype, ctx.neuron_dim, ctx.call = z.shape, z.dtype, call.neuron_dim, call
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(z)
        return z, loss.clone()

    @staticmethod
    def backward(ctx, grad, loss_grad):
        entries, directions, anchor = ctx.saved_tensors
        factor = ctx.call.factor(ctx, loss_grad)
        if ctx.call.state.comparing:
            ctx.call.compare(ctx, grad, directions, factor)
        added = None
        if factor is not None:
            values = (2 * factor * directions).to(ctx.dtype)
            added = _at(entries, values, ctx, meets_dense=grad is not None, anchor=anchor)
        return added, grad, *[None] * 5


class _Deactivated(torch.autograd.Function):
    """Gives z with other values in the selected entries, whose gradient is times -delta."""

    @staticmethod
    def forward(ctx, z, _, entries, values, anchor, delta, neuron_dim):
        ctx.save_for_backward(entries, anchor)
        ctx.shape, ctx.delta, ctx.neuron_dim = z.shape, delta, neuron_dim
        ctx.set_materialize_grads(False)
        out = z.clone()
        out.movedim(neuron_dim, -1).put_(entries.long(), values)
        return out

    @staticmethod
    def backward(ctx, grad):
        entries, anchor = ctx.saved_tensors
        added = None
        if grad is not None:
            values = grad.movedim(ctx.neuron_dim, -1).take(entries.long()) * -(1 + ctx.delta)
            added = _at(entries, values, ctx, meets_dense=True, anchor=anchor)
        return added, grad, *[None] * 5


def activated(pre: Tensor, state: LayerState) -> Tensor:
    """The inhibited activations of `pre` [..., units], in whose backward pass L_MS injects its
    gradient."""
    return _Activated.apply(pre, state)


class _Activated(torch.autograd.Function):
    """Non-linearity and method in one, whose gradient nobody else holds: it is written into."""

    @staticmethod
    def forward(ctx, pre, state):
        z = kernels.activate(pre, state.activation)
        entries, values, _, rows = _observe(z, None, state, neuron_dim=-1)
        if state.config.method == "deactivate":
            z.put_(entries.long(), values)
        ctx.save_for_backward(pre, entries, values)
        ctx.call = _Call(state, None, -1, rows, inject=True)
        return z

    @staticmethod
    def backward(ctx, grad):
        with torch.no_grad():
            to_pre = _through_activation(ctx, grad)
        if torch.is_grad_enabled():
            to_pre = _Once.apply(to_pre, ctx.saved_tensors[0])
        return to_pre, None


def _through_activation(ctx, grad: Tensor) -> Tensor:
    """`_Activated`'s gradient: the non-linearity's, and anew where entries are selected."""
    pre, entries, values = ctx.saved_tensors
    state = ctx.call.state
    to_pre = kernels.activation_backward(grad, pre, state.activation, torch.empty_like(pre))
    if ctx.call.rows == 0 or state.config.method == "none":
        return to_pre
    arriving, correct = (grad, pre, state.activation), state.backend(pre).correct
    if state.config.method == "deactivate":
        correct(to_pre, *arriving, entries, None, scale=-state.config.delta)
        return to_pre
    factor = float(ctx.call.factor(ctx, None))
    if state.comparing:
        ctx.call.compare(ctx, grad, values, factor)
    if factor:  # without one the gradient has the bits of a run without L2E
        correct(to_pre, *arriving, entries, values, factor=2 * factor)
    return to_pre


class _Once(torch.autograd.Function):
    """A gradient that has none of its own; `anchor` ties it to the graph of what it is of."""

    @staticmethod
    def forward(ctx, grad, anchor):
        return grad.clone()

    backward = staticmethod(inhibition.no_second_derivatives)


def _at(entries: Tensor, values: Tensor, ctx, meets_dense: bool, anchor: Tensor) -> Tensor:
    """A gradient of these values at the entries of these numbers, and zero elsewhere.

    Sparse where it meets a dense one, in place. No entry is there twice, which is all that takes.
    """
    size = torch.empty(ctx.shape, device="meta").movedim(ctx.neuron_dim, -1).shape
    places = _places(entries.long(), size, ctx.neuron_dim)
    # Of its public form PyTorch 2.11 warns that checks are off, which it was told to leave off.
    gradient = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors(
        len(ctx.shape),
        0,
        ctx.shape,
        places,
        values,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=values.device,
        is_coalesced=True,
    )
    if torch.is_grad_enabled():
        return _Once.apply(gradient.to_dense(), anchor)
    return gradient if meets_dense else gradient.to_dense()


def _places(entries: Tensor, moved: torch.Size, neuron_dim: int) -> Tensor:
    """[dimensions, entries], from their numbers where the neurons are the last dimension."""
    places: list[Tensor] = []
    for size in reversed(moved[1:]):
        outer = entries // size
        places.insert(0, entries - outer * size)
        entries = outer
    places.insert(0, entries)
    places.insert(neuron_dim % len(moved), places.pop())
    return torch.stack(places)


def _observe(
    z: Tensor, counted: Tensor | None, state: LayerState, neuron_dim: int
) -> tuple[Tensor, Tensor, float, int]:
    """What `kernels.observe` gives, entries by their numbers where the neurons are the last
    dimension; and how many rows counted.
    """
    moved = z if neuron_dim == -1 else z.movedim(neuron_dim, -1)
    rows = inhibition.as_rows(moved, state)
    kept = None
    if counted is not None:
        kept = inhibition.kept_rows(counted, moved, neuron_dim, state)
        rows = rows[kept]
    if len(rows) == 0:
        return torch.empty(0, dtype=torch.int32, device=z.device), z.new_empty(0), 0.0, 0
    sequence = inhibition.rows_of_sequence(moved, kept, state)
    arguments, _ = inhibition.prepare(state, rows, None, sequence, activated=True)
    sums = None if inhibition.in_backward() else state.core_sums
    entries, values, loss = state.backend(rows).observe(rows, arguments, sums)
    if sums is not None:
        inhibition.count(state, rows, arguments)
    if kept is not None:
        places = kept[entries // state.neurons] * state.neurons + entries % state.neurons
        entries = places.int()
    return entries, values, loss, len(rows)
