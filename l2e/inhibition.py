"""The layer's operation: observe the activations, and do to the selected ones what is configured.

`inhibit` is one opaque operator for autograd and torch.compile. Its backward pass keeps nothing
but the pre-activations. A layer's state is reached by a handle, a number in a tensor, so that
neither another layer nor what changes from step to step (thresholds, loss scale) recompiles a
graph.
"""

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from l2e import backends, kernels, selection
from l2e.kernels import KernelArguments
from l2e.state import LayerState
from l2e.threshold import histogram

_states: WeakValueDictionary[int, LayerState] = WeakValueDictionary()
_handles = itertools.count()


def register(state: LayerState) -> Tensor:
    """A handle for the operators below, valid while the state lives."""
    handle = next(_handles)
    _states[handle] = state
    return torch.tensor(handle)


def in_backward() -> bool:
    """Inside a backward pass, so that a forward pass here is an activation recomputed."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("l2e::inhibit", mutates_args=())
def inhibit(
    pre: Tensor, bias: Tensor | None, handle: Tensor, keep_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a layer in training mode.

    Args:
        pre: [..., units], the values before the non-linearity.
        bias: [units], still to be added to them; None if a linear layer has done so.
        handle: of the layer's state, whose sums this call adds to.
        keep_mask: whether the layer selects by top k.

    Returns:
        The inhibited activations [..., units]; the sum over selected entries of log (z - mean)^2
        as a float32 scalar (of log of the MS if scale-invariant), whose gradient reaches `pre`;
        and the mask of what was selected (empty where the backward pass computes it again).
    """
    state = _states[int(handle)]
    recomputing = in_backward()
    rows = _as_rows(pre, state)
    observed = state.kernel_arguments(None, None, bias)
    if state.empty and not recomputing and len(rows):
        _start(state, rows, observed)
    threshold, replacement, mask = selection.select(
        state, rows, observed, sequence=pre.shape[-2] if pre.dim() > 2 else 1
    )
    arguments = state.kernel_arguments(threshold, replacement, bias)
    sums = None if recomputing else torch.zeros_like(state.core_sums)
    out = backends.choose(state.config, rows.device, rows.dtype).forward(rows, arguments, sums)
    loss = torch.zeros((), device=pre.device)
    if sums is not None:
        loss = _record(state, rows, arguments, sums)
    return out.view(pre.shape), loss, mask.view(pre.shape) if len(mask) else mask


@inhibit.register_fake
def _(
    pre: Tensor, bias: Tensor | None, handle: Tensor, keep_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), device=pre.device)
    mask = torch.empty(pre.shape if keep_mask else 0, dtype=torch.bool, device=pre.device)
    return torch.empty_like(pre), loss, mask


@torch.library.custom_op("l2e::inhibit_backward", mutates_args=())
def inhibit_backward(
    grad: Tensor,
    loss_grad: Tensor | None,
    pre: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    handle: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients to `pre` and to the bias ([0] if there is none).

    Without a gradient to the loss, L_MS injects its own.
    """
    state = _states[int(handle)]
    rows = _as_rows(pre, state)
    threshold = None
    if state.selecting:
        threshold = mask.view(rows.shape) if len(mask) else state.threshold
    injected = state.phase.gradient_scale * state.loss_factor(len(rows))
    loss_gradient = injected if loss_grad is None else loss_grad
    chosen = backends.choose(state.config, rows.device, rows.dtype)
    arguments = state.kernel_arguments(threshold, None, bias)
    out, bias_grad = chosen.backward(grad.reshape(rows.shape), rows, arguments, loss_gradient)
    if bias_grad is None:
        bias_grad = pre.new_empty(0)
    else:  # of every position's neurons, which share it
        bias_grad = bias_grad.view(state.positions, -1).sum(0)
    return out.view(pre.shape), bias_grad


@inhibit_backward.register_fake
def _(
    grad: Tensor,
    loss_grad: Tensor | None,
    pre: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    handle: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pre), pre.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output) -> None:
    pre, bias, handle, _ = inputs
    ctx.save_for_backward(pre, bias, output[2], handle)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, loss_grad, _):
    pre, bias, mask, handle = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(pre)
    to_pre, to_bias = inhibit_backward(grad, loss_grad, pre, bias, mask, handle)
    return to_pre, None if bias is None else to_bias, None, None


inhibit.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("l2e::observe_output", mutates_args=("sums",))
def observe_output(sums: Tensor, mlp_output: Tensor, residual: Tensor, handle: Tensor) -> None:
    """Add the sums of squares of a block's MLP output and residual stream to `sums` [2].

    On measured steps alone; asked here, so that a compiled graph serves all steps.
    """
    if _states[int(handle)].measuring and not in_backward():
        sums[0] += mlp_output.float().square().sum()
        sums[1] += residual.float().square().sum()


@observe_output.register_fake
def _(sums: Tensor, mlp_output: Tensor, residual: Tensor, handle: Tensor) -> None:
    return None


def _as_rows(pre: Tensor, state: LayerState) -> Tensor:
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
            "'position', and give every module a layer of its own"
        )
    state.to(pre.device)
    return pre.detach().reshape(-1, state.neurons).contiguous()


def _start(state: LayerState, rows: Tensor, arguments: KernelArguments) -> None:
    """Before there are statistics, sums are taken around the first call's own mean."""
    if not state.started:
        state.started = True
        z = kernels.activate(arguments.biased(rows), arguments.activation).float()
        state.statistics.mean.copy_(z.mean(0))


def _record(state: LayerState, rows: Tensor, arguments: KernelArguments, sums: Tensor) -> Tensor:
    """Add one call's sums to the step's; returns the call's sum of logs."""
    if arguments.balance is not None:
        selected, var = sums[:-1].view(3, -1)[2], state.statistics.var
        sums[-1] -= (selected * torch.where(var > 0, var, 1).log()).sum()
    state.core_sums.add_(sums)
    state.sums["samples"].add_(len(rows))
    if state.measuring and len(rows):
        _measure(state, rows, arguments)
    return sums[-1].clone()


def _measure(state: LayerState, rows: Tensor, arguments: KernelArguments) -> None:
    """What is only logged: fourth moments, the largest MS, and the histogram of the MS."""
    largest = state.measured["largest"][state.sharding.data_rank]
    for part in kernels.slices(rows):
        z = kernels.activate(arguments.biased(rows[part]), arguments.activation).float()
        square = (z - arguments.mean).square_()
        state.measured["fourth"].add_((square * square).sum(0))
        scale = square.div_(state.denominator)
        torch.maximum(largest, scale.max(), out=largest)
        state.counts.add_(histogram(scale))
