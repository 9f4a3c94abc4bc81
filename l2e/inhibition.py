"""The layer's operation: observe the activations, and do to the selected ones what is configured.

`inhibit` is one opaque operator for autograd and torch.compile. Its backward pass keeps nothing
but the pre-activations. A layer's state is reached by a handle, a number in a tensor, so that
neither another layer nor what changes from step to step (thresholds, loss scale) recompiles a
graph.
"""

import itertools
import math
import warnings
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from l2e import kernels, selection
from l2e.kernels import KernelArguments
from l2e.state import LayerState

_states: WeakValueDictionary[int, LayerState] = WeakValueDictionary()
_handles = itertools.count()


def register(state: LayerState) -> Tensor:
    """A handle for the operators below, valid while the state lives."""
    handle = next(_handles)
    _states[handle] = state
    return torch.tensor(handle, device="cpu")  # also under torch.device("cuda"): read every call


def in_backward() -> bool:
    """Inside a backward pass, so that a forward pass here is an activation recomputed."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("l2e::inhibit", mutates_args=())
def inhibit(
    pre: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    handle: Tensor,
    keep_mask: bool,
    neuron_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a layer in training mode.

    Args:
        pre: [..., units], the values before the non-linearity.
        bias: [units], still to be added to them; None if a linear layer has done so.
        counted: true for each sample that counts, of as many dimensions as `pre` without its
            last, or with 1 there; the others pass as they are. None: all count.
        handle: of the layer's state, whose sums this call adds to.
        keep_mask: whether the layer selects by a mask: by top k, or at random.
        neuron_dim: the dimension of `pre` (and of a `counted` of as many) that is its last above.

    Returns:
        The inhibited activations [..., units], laid out as `pre` is; the sum over selected entries
        of log (z - mean)^2 as a float32 scalar (of log of the MS if scale-invariant), whose
        gradient reaches `pre`; and the mask of what was selected (empty where the backward pass
        computes it again).
    """
    state = _states[int(handle)]
    pre = pre.movedim(neuron_dim, -1)
    all_rows = as_rows(pre, state)
    kept = None if counted is None else kept_rows(counted, pre, neuron_dim, state)
    rows = all_rows if kept is None else all_rows[kept]
    out, loss, mask = _forward(state, rows, bias, rows_of_sequence(pre, kept, state))
    if kept is not None:
        out = _among(all_rows, kept, out, state)
        if keep_mask:
            mask = torch.zeros_like(all_rows, dtype=torch.bool).index_copy_(0, kept, mask)
    mask = mask.view(pre.shape).movedim(-1, neuron_dim).contiguous() if keep_mask else mask.view(0)
    # .data: no view, so that what follows may work in place on it.
    return _laid_out(out, pre).movedim(-1, neuron_dim).data, loss, mask.data


@torch.library.custom_op("l2e::observe", mutates_args=())
def observe(pre: Tensor, counted: Tensor | None, handle: Tensor, neuron_dim: int) -> Tensor:
    """Add to a layer's sums what `inhibit` would, and change nothing; its loss is returned."""
    state = _states[int(handle)]
    pre = pre.movedim(neuron_dim, -1)
    rows = as_rows(pre, state)
    if counted is not None:
        rows = rows[kept_rows(counted, pre, neuron_dim, state)]
    return _forward(state, rows, None, 1)[1]


@observe.register_fake
def _(pre: Tensor, counted: Tensor | None, handle: Tensor, neuron_dim: int) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=pre.device)


def _forward(
    state: LayerState, rows: Tensor, bias: Tensor | None, sequence: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `inhibit` returns, of rows [samples, neurons]; without samples nothing is done."""
    if len(rows) == 0:
        mask = torch.zeros_like(rows, dtype=torch.bool)
        return rows.clone(), torch.zeros((), dtype=torch.float32, device=rows.device), mask
    recomputing = in_backward()
    arguments, mask = prepare(state, rows, bias, sequence)
    sums = None if recomputing else torch.zeros_like(state.core_sums)
    out = state.backend(rows, arguments).forward(rows, arguments, sums)
    loss = arguments.mean.new_zeros(())
    if sums is not None:
        loss = record(state, rows, arguments, sums)
    return out, loss, mask


def prepare(
    state: LayerState,
    rows: Tensor,
    bias: Tensor | None,
    sequence: int,
    activated: bool = False,
) -> tuple[KernelArguments, Tensor]:
    """What the kernels do to rows [samples, neurons], and `select`'s mask for the backward pass.

    Rows that are `activated` have their bias and the non-linearity behind them.
    """
    observed = state.kernel_arguments(None, None, bias, activated)
    if state.empty and not in_backward():
        _start(state, rows, observed)
    threshold, replacement, mask = selection.select(state, rows, observed, sequence)
    return state.kernel_arguments(threshold, replacement, bias, activated), mask


@inhibit.register_fake
def _(
    pre: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    handle: Tensor,
    keep_mask: bool,
    neuron_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=pre.device)
    mask = torch.empty(pre.shape if keep_mask else 0, dtype=torch.bool, device=pre.device)
    return torch.empty_like(pre), loss, mask


@torch.library.custom_op("l2e::inhibit_backward", mutates_args=())
def inhibit_backward(
    grad: Tensor,
    loss_grad: Tensor | None,
    pre: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    mask: Tensor,
    handle: Tensor,
    neuron_dim: int,
) -> tuple[Tensor, Tensor]:
    """Gradients to `pre` and to the bias ([0] if there is none).

    Without a gradient to the loss, L_MS injects its own.
    """
    state = _states[int(handle)]
    pre = pre.movedim(neuron_dim, -1)
    all_rows = as_rows(pre, state)
    all_grads = grad.movedim(neuron_dim, -1).reshape(all_rows.shape)
    if mask.numel():
        mask = mask.movedim(neuron_dim, -1).reshape(all_rows.shape)
    kept = None if counted is None else kept_rows(counted, pre, neuron_dim, state)
    if kept is None:
        out, bias_grad = _gradients(state, all_grads, all_rows, loss_grad, bias, mask)
    else:
        mask = mask[kept] if mask.numel() else mask
        out, bias_grad = _gradients(state, all_grads[kept], all_rows[kept], loss_grad, bias, mask)
        out = _among(all_grads, kept, out, state)
    if bias_grad is None:
        bias_grad = pre.new_empty(0)
    else:  # of every position's neurons, which share it
        bias_grad = bias_grad.view(state.positions, -1).sum(0)
    return _laid_out(out, pre).movedim(-1, neuron_dim), bias_grad


def _gradients(
    state: LayerState,
    grads: Tensor,
    rows: Tensor,
    loss_grad: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
) -> kernels.Gradients:
    """Gradients to rows [samples, neurons] and to the bias of all their neurons."""
    if len(rows) == 0:
        return grads.clone(), None if bias is None else torch.zeros_like(bias).repeat(
            state.positions
        )
    threshold = None
    if state.selecting:
        threshold = mask if mask.numel() else state.threshold
    injected = state.phase.gradient_scale * state.loss_factor(len(rows))
    loss_gradient = injected if loss_grad is None else loss_grad
    arguments = state.kernel_arguments(threshold, None, bias)
    squares = arguments.mean.new_zeros(2) if state.comparing else None
    backward = state.backend(rows, arguments).backward
    gradients = backward(grads, rows, arguments, loss_gradient, squares)
    if squares is not None:
        state.compare(squares, loss_gradient)
    return gradients


@inhibit_backward.register_fake
def _(
    grad: Tensor,
    loss_grad: Tensor | None,
    pre: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    mask: Tensor,
    handle: Tensor,
    neuron_dim: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pre), pre.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    pre, bias, counted, handle, _, ctx.neuron_dim = inputs
    ctx.save_for_backward(pre, bias, counted, output[2], handle)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, loss_grad, _):
    pre, bias, counted, mask, handle = ctx.saved_tensors
    if type(handle) is Tensor:  # not while torch.compile traces it
        state = _states[int(handle)]
        injects = state.config.method == "regularize" and state.phase.gradient_scale
        if loss_grad is None and injects:
            inject_once(ctx, state)
        if grad is not None and state.comparing:
            compare_once(ctx, state)
    if grad is None:
        grad = torch.zeros_like(pre)
    to_pre, to_bias = inhibit_backward(
        grad, loss_grad, pre, bias, counted, mask, handle, ctx.neuron_dim
    )
    return to_pre, None if bias is None else to_bias, None, None, None, None


def inject_once(ctx, state: LayerState) -> None:
    """Refuse to add L_MS's gradient in a second backward pass through one forward pass."""
    if getattr(ctx, "injected", False):
        raise ValueError(
            f"l2e layer {state.name}: a second backward pass goes through one forward pass "
            "(retain_graph=True), in which L_MS's gradient would be injected twice: run one "
            "backward pass of the sum of the losses, or attach without inject=True and add "
            "handle.loss() to one of them"
        )
    ctx.injected = True


def compare_once(ctx, state: LayerState) -> None:
    """Tell that of a second backward pass through one forward pass the squares are added."""
    if getattr(ctx, "compared", False):
        warnings.warn(
            f"l2e layer {state.name}: a second backward pass goes through one forward pass "
            "(retain_graph=True). l2e.gradient_ratio takes the two gradients for independent ones, "
            "which their sum may not be: run one backward pass of the sum of the losses",
            stacklevel=2,
        )
    ctx.compared = True


def no_second_derivatives(ctx, *grads):
    raise ValueError(
        "l2e: a gradient's gradient (create_graph=True, a gradient penalty) reached an inhibited "
        "layer, whose method has no second derivatives: run this forward pass inside "
        "`with handle.paused():`, or use method = 'none'"
    )


inhibit.register_autograd(_backward, setup_context=_setup_context)
inhibit_backward.register_autograd(no_second_derivatives)


@torch.library.custom_op("l2e::observe_output", mutates_args=("sums",))
def observe_output(sums: Tensor, mlp_output: Tensor, residual: Tensor, handle: Tensor) -> None:
    """Add the sums of squares of a block's MLP output and residual stream to `sums` [2].

    On measured steps alone; asked here, so that a compiled graph serves all steps.
    """
    if _states[int(handle)].measuring and not in_backward():
        sums[0] += sum_of_squares(mlp_output)
        sums[1] += sum_of_squares(residual)


def sum_of_squares(values: Tensor) -> Tensor:
    """In float32, without a float32 copy of more than some rows."""
    rows = values.flatten(0, -2)
    count = max(1, kernels.SLICE_ENTRIES["cuda"] // rows.shape[1])
    return torch.stack([part.float().square().sum() for part in rows.split(count)]).sum()


@observe_output.register_fake
def _(sums: Tensor, mlp_output: Tensor, residual: Tensor, handle: Tensor) -> None:
    return None


def as_rows(pre: Tensor, state: LayerState) -> Tensor:
    """[..., units] -> [samples, neurons], contiguous."""
    by_position = state.config.neuron_axes == "position"
    if by_position and pre.dim() < 3:
        raise ValueError(
            f"l2e layer {state.name}: neuron_axes = 'position' needs activations of shape "
            f"[batch, positions, units], found {list(pre.shape)}"
        )
    units, positions = pre.shape[-1], pre.shape[-2] if by_position else 1
    if state.positions == 0:
        state.allocate(units, positions, pre.device)
    if (units, positions) != (state.units, state.positions):
        raise ValueError(
            f"l2e layer {state.name}: found {positions} positions after {state.positions} and "
            f"{units} units after {state.units}; pad sequences to one length for neuron_axes = "
            "'position', give every module a layer of its own, and let l2e.attach's neuron_dim "
            "name a dimension of fixed size"
        )
    state.to(pre.device)
    samples = math.prod(pre.shape[: -2 if by_position else -1])
    return pre.detach().reshape(samples, state.neurons).contiguous()


def rows_of_sequence(pre: Tensor, kept: Tensor | None, state: LayerState) -> int:
    """Rows of one sequence: its positions, unless a row holds them all."""
    return pre.shape[-2] // state.positions if pre.dim() > 2 and kept is None else 1


def _laid_out(rows: Tensor, pre: Tensor) -> Tensor:
    """[samples, neurons] -> a tensor of the shape of `pre`, with its strides where it is dense."""
    out = rows.view(pre.shape)
    if out.stride() == torch.empty_like(pre, device="meta").stride():
        return out
    return torch.empty_like(pre).copy_(out)


def _among(rows: Tensor, kept: Tensor, part: Tensor, state: LayerState) -> Tensor:
    """All rows as they are, but for the part that counts; a silenced layer is so everywhere."""
    all_rows = torch.zeros_like(rows) if state.config.method == "silence" else rows.clone()
    return all_rows.index_copy_(0, kept, part)


def kept_rows(counted: Tensor, pre: Tensor, neuron_dim: int, state: LayerState) -> Tensor:
    """The rows of `as_rows` that count, by number.

    Raises:
        ValueError: the mask does not fit the activations.
    """
    shape = pre.shape[:-1]
    found = f"l2e layer {state.name}: a mask of shape {list(counted.shape)}"
    if counted.dim() == pre.dim() and counted.shape[neuron_dim] == 1:
        counted = counted.squeeze(neuron_dim)
    fits = counted.dim() == len(shape) and all(
        n in (1, m) for n, m in zip(counted.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{found} for samples of shape {list(shape)}: give it these dimensions, of the same "
            "size or 1"
        )
    if counted.is_floating_point() and not ((counted == 0) | (counted == 1)).all():
        raise ValueError(f"{found} with other values than 0 and 1: 1 or true is what counts")
    if state.config.memel_code_compat:
        raise ValueError(
            f"{found}: memel_code_compat = true selects over whole sequences, padding included, as "
            "MEmeL's code does; use memel_code_compat = false, or no mask"
        )
    counted = (counted != 0).expand(shape)
    if state.config.neuron_axes == "position":
        if not (counted == counted[..., :1]).all():
            raise ValueError(
                f"{found} that leaves out positions: of neuron_axes = 'position' a sample is a "
                "whole sequence; use neuron_axes = 'unit', or mask whole sequences"
            )
        counted = counted[..., 0]
    return counted.flatten().nonzero().flatten()


def _start(state: LayerState, rows: Tensor, arguments: KernelArguments) -> None:
    """Before there are statistics, sums are taken around the first call's own mean."""
    if not state.started:
        state.started = True
        z = kernels.activate(arguments.biased(rows), arguments.activation).float()
        state.mean.copy_(z.mean(0))


def record(state: LayerState, rows: Tensor, arguments: KernelArguments, sums: Tensor) -> Tensor:
    """Add one call's sums to the step's; returns the call's sum of logs."""
    if arguments.balance is not None:
        selected, var = sums[:-1].view(3, -1)[2], state.statistics.var
        sums[-1] -= (selected * torch.where(var > 0, var, 1).log()).sum()
    state.core_sums.add_(sums)
    count(state, rows, arguments)
    return sums[-1].clone()


def count(state: LayerState, rows: Tensor, arguments: KernelArguments) -> None:
    """Add to the step's sums what a call's number of rows, and what is measured, add to them."""
    state.samples.add_(len(rows))
    if state.measuring:
        _measure(state, rows, arguments)


def _measure(state: LayerState, rows: Tensor, arguments: KernelArguments) -> None:
    state.backend(rows, arguments).measure(
        rows,
        arguments,
        state.denominator,
        state.measured["fourth"],
        state.measured["largest"][state.sharding.data_rank],
        state.counts,
    )
