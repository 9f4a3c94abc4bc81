"""Put the method into any PyTorch model, by module names, in two lines.

handle = l2e.attach(model, "transformer.h.*.mlp.act", config)
...
(task_loss + handle.loss()).backward(); optimizer.step(); handle.step()
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from l2e import matching
from l2e.config import L2EConfig
from l2e.controller import MEASURED, Controller
from l2e.hook import ForwardPass, ModuleHook, OwnerHook
from l2e.layer import L2ELayer
from l2e.masks import AfterModelHook, ModelHook
from l2e.outputs import Key
from l2e.reminder import StepReminder, skipped
from l2e.sharding import Sharding

if TYPE_CHECKING:
    from l2e.trainer_callback import StepCallback


def attach(
    model: nn.Module,
    pattern: str,
    config: L2EConfig,
    *,
    neuron_dim: int | None = None,
    output: Key | None = None,
    mask: str | None = None,
    inject: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    observe_no_grad: bool = False,
    sharding: Sharding | None = None,
) -> Handle:
    """Observe and inhibit the forward outputs of modules of `model`.

    Only passes in training mode count. A pass without gradients is neither counted nor changed,
    unless `observe_no_grad` asks for it; nor is one inside `with handle.paused():`. With method
    "none" an output stays the very tensor it was.

    Compiled models: from here on torch.compile guards on hooks in this process
    (`torch._dynamo.config.skip_nnmodule_hook_guards = False`), and what was compiled without such
    guards is compiled again, so that attaching and detaching work before and after compiling.

    Args:
        pattern: of module names, with * for any text; `config.layers` chooses among those that
            match, in the model's order. The model itself never matches; of modules inside one
            another the outermost does.
        neuron_dim: the dimension of an output that counts its neurons (1 for images
            [batch, channels, height, width]); by default the last one of outputs with up to three
            dimensions, and of a linear layer's. Others are asked for.
        output: the key, field or index of the part that is meant of an output with several
            (a tuple, dict, ModelOutput); by default its first floating-point tensor.
        mask: the argument of the model's forward that tells which samples count (true or 1), of
            shape [batch, sequence], as "attention_mask". The others, padding, are neither counted
            nor selected nor changed. Other loops give it with `handle.mask(tensor)`.
        inject: add L_MS's gradient in the backward pass, for training loops whose loss is out of
            reach; `handle.controller.gradient_scale` is its factor. Otherwise add `handle.loss()`
            to the loss.
        optimizer: step by itself after each of this optimizer's real steps, so that accumulated
            micro-batches count as one step. What a gradient scaler skips waits for the next real
            step. Otherwise call `handle.step()`.
        observe_no_grad: also observe and inhibit passes without gradients.
        sharding: process groups; by default all processes of a torch.distributed that is
            initialised at the first step are data-parallel ranks, as under DDP and FSDP.

    A module that is called several times between two steps (a recurrent cell, micro-batches)
    counts all of its calls as samples of its own neurons.

    Raises:
        ValueError: no module matches, one is attached to already, `config.layers` names one that
            is not there, or an argument does not fit the model; later, in a forward pass, that an
            output has no neurons where the arguments say.
    """
    _check_types(model=model, config=config, neuron_dim=neuron_dim, output=output, mask=mask)
    return Handle(
        matching.chosen(model, pattern, config),
        config,
        model=model,
        neuron_dim=neuron_dim,
        output=output,
        mask=mask,
        inject=inject,
        optimizer=optimizer,
        observe_no_grad=observe_no_grad,
        sharding=sharding,
    )


class Handle(Joinable):
    """The method at work in a model, until `detach()`.

    Save `state_dict()` beside the model's; the model's own state holds nothing of the method.
    A handle that is copied or pickled with a model is an empty one, which says so when used.
    For data-parallel ranks with uneven inputs, `with Join([ddp_model, handle]):`.

    Attributes:
        names: the modules whose outputs are inhibited.
        controller: for `measure`, `gradient_scale`, `histograms()`.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        config: L2EConfig,
        *,
        model: nn.Module,
        neuron_dim: int | None = None,
        output: Key | None = None,
        mask: str | None = None,
        inject: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        observe_no_grad: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            _refuse_attached(name, module)
        self.optimizer = None if optimizer is None else _innermost(optimizer)
        self.names = list(modules)
        self.layers = [
            L2ELayer(None, config, activation=None, name=name, inhibited_layers=len(modules))
            for name in modules
        ]
        self.controller = Controller(self.layers, config, sharding)
        self.controller.gradient_scale = 1.0 if inject else 0.0
        self.inject = inject
        self._groups_known = sharding is not None
        self._reminder = StepReminder(model, self.controller)
        self._pass = ForwardPass(observe_no_grad, not inject, self._reminder)
        self._model_hook = ModelHook(model, self._pass, mask, self.names)
        self._hooks = [
            ModuleHook(module, layer, self._pass, neuron_dim, output)
            for module, layer in zip(modules.values(), self.layers, strict=True)
        ]
        self._owner_hooks = OwnerHook.of(model, self._hooks)
        self._after_hooks = [AfterModelHook(model, self._pass)] if mask else []
        self._loss: Tensor | None = None
        self._loss_was_taken = False
        self._warned: set[str] = set()
        self._registered: list[Any] = [
            model.register_forward_pre_hook(self._model_hook, with_kwargs=True),
            *(hook.module.register_forward_pre_hook(hook) for hook in self._owner_hooks),
            *(model.register_forward_hook(hook, always_call=True) for hook in self._after_hooks),
            *(hook.module.register_forward_hook(hook) for hook in self._hooks),
        ]
        if self.optimizer is not None:
            hook = torch.compiler.disable(self._after_optimizer_step)
            stepped = self.optimizer.register_step_post_hook(hook)
            self._registered.append(stepped)
        _guard_hooks_of_compiled_models()

    def loss(self) -> Tensor:
        """L_MS of the forward passes since the last call: add it to the micro-batch's loss.

        A float32 scalar, the mean over all samples of these passes; 0 unless the method is
        "regularize", where L_MS is injected, and of a pass in eval mode. The same until the next
        forward pass. A pass whose graph another backward pass has used has no part in it.
        """
        if any(hook.terms for hook in self._hooks):
            self._reminder.loss_taken()
            with torch.inference_mode(False), torch.enable_grad():  # also where it is only logged
                self._loss = self._of_terms()
            self._loss_was_taken = True
        elif self._loss is None or (self._pass.evaluated and not self._model_hook.module.training):
            return torch.zeros((), dtype=torch.float32)
        return self._loss

    def _of_terms(self) -> Tensor:
        device = next(h.terms[0][0].device for h in self._hooks if h.terms)
        total = torch.zeros((), dtype=torch.float32, device=device)
        for hook in self._hooks:
            terms = [term for term in hook.terms if not _graph_was_used(term[0])]
            if len(terms) < len(hook.terms):
                self._warn_once(
                    "the graph of a forward pass was used by another backward pass before "
                    "handle.loss(), so its L_MS is in no loss: take handle.loss() before that "
                    "backward pass and add it, or run a pass that is not the method's inside "
                    "`with handle.paused():`"
                )
            hook.terms.clear()
            state = hook.layer.state
            if terms and state.config.method == "regularize":
                entries = torch.as_tensor(sum(entries for _, entries in terms))
                logs = torch.stack([logs for logs, _ in terms]).sum()
                samples = (entries.float() / state.neurons).clamp(min=1).to(logs.device)
                total = total + (state.loss_factor(1) / samples * logs).to(device)
        return total

    def step(self) -> None:
        """Merge what was observed; call it once after each optimizer step, on every rank.

        Warns, after the first, of modules that were never called in training mode.
        """
        self._live()
        if self.optimizer is not None:
            raise ValueError(
                "l2e: this handle steps by itself after its optimizer's steps: do not call step(), "
                "or attach without optimizer="
            )
        self._step()

    def _step(self) -> None:
        self._refuse_to_be_left_behind()
        Join.notify_join_context(self)
        if not self._groups_known:
            self._groups_known = True
            world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
            self.controller.place(Sharding(data_group=world))
            self._agree_with_other_ranks()
        self._warn_of_unused_loss()
        self._warn_of_replaced()
        observed = self._reminder.observed
        self._forget_pass()
        self._model_hook.steps_to_look -= 1
        first = self.controller.unobserved is None
        self.controller.step()
        if first:
            self._warn_of_unobserved()
        elif not any(hook.module.training for hook in self._hooks):
            self._warn_once(
                "every attached module is in eval mode at this step, where nothing is observed or "
                "inhibited: call model.train() after validation"
            )
        elif not observed and self.controller.sharding.data_size == 1:
            self._warn_once(
                "no attached module was called with gradients in training mode since the last "
                "step, and yet this counts as one: call handle.step() once after each optimizer "
                "step"
            )

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not skipped(optimizer):
            self._step()

    def discard(self) -> None:
        """Forget what was observed since the last step: of a batch that is skipped.

        After an out-of-memory error or a loss that is not finite, before `step()`.
        """
        self._live()
        self._forget_pass()
        self.controller.discard()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Observe and change nothing inside: for generation, teachers, roll-outs, penalties."""
        self._live()
        before, self._pass.paused = self._pass.paused, True
        try:
            yield
        finally:
            self._pass.paused = before

    def mask(self, counted: Tensor | None) -> None:
        """Which samples of the next forward passes count, until the next call; None: all.

        Args:
            counted: true or 1 for a sample that counts, of as many dimensions as an output without
                its neurons ([batch, sequence]), or with 1 neuron; sizes are the same or 1.
        """
        self._live()
        if self._model_hook.takes:
            raise ValueError(
                "l2e: this handle takes its mask from an argument of the model; attach without "
                "mask= to give masks yourself"
            )
        if not (counted is None or isinstance(counted, Tensor)):
            raise ValueError(
                f"l2e: handle.mask({type(counted).__name__}): expected a tensor, true or 1 for "
                "each sample that counts, or None"
            )
        self._pass.counted = counted

    def metrics(self) -> dict[str, dict[str, float]]:
        """As `Controller.metrics`, less what was not measured; of a module without samples NaN.

        tau, selected_fraction and std are there after every step; the others, which cost time, of
        the last step before which `handle.controller.measure = True` was set.
        """
        self._live()
        found = self.controller.metrics()
        nothing = self.controller.nothing()
        measured = {n for one in found.values() for n, value in one.items() if value == value}
        told = [name for name in nothing if name in measured or name not in MEASURED]
        return {
            state.name: {name: found.get(state.name, nothing)[name] for name in told}
            for state in self.controller.states
        }

    def state_dict(self) -> dict[str, Tensor]:
        """As `Controller.state_dict`; the model's own state dict holds nothing of the method."""
        self._live()
        return self.controller.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """As `Controller.load_state_dict`.

        A state saved from a wrapped or unwrapped form of the model fits where one and the same
        prefix makes the difference in all names ("base_model.model." of peft, "module.").
        """
        self._live()
        own = [state.name for state in self.controller.states]
        saved = {name.rpartition(".")[0] for name in tensors} - {""}
        self.controller.load_state_dict(matching.renamed(tensors, saved, own))

    def detach(self) -> None:
        """Leave the model as it was before `attach`, and the copies that were made of it."""
        self._live()
        for registered in self._registered:
            registered.remove()
        self._reminder.detach()
        for hook in (self._model_hook, *self._after_hooks, *self._owner_hooks, *self._hooks):
            hook.clean_copies()
        self._forget_pass()

    def trainer_callback(self) -> StepCallback:
        """For `transformers.Trainer(callbacks=[...])`; needs attach(..., inject=True).

        It steps after each optimizer step, scales L_MS by the micro-batches of each step, and
        keeps the method's state in `l2e.pt` in the Trainer's checkpoint folders, from which
        `resume_from_checkpoint` goes on.
        """
        from l2e.trainer_callback import StepCallback

        self._live()
        return StepCallback(self)

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Step along with the ranks that still have inputs (torch.distributed's `Join`)."""
        return _StepAlong(self)

    @property
    def join_device(self) -> torch.device:
        return next((s.device for s in self.controller.states if s.positions), torch.device("cpu"))

    @property
    def join_process_group(self) -> Any:
        return self.controller.sharding.data_group or dist.group.WORLD

    def __repr__(self) -> str:
        self._live()
        method, step = self.controller.config.method, self.controller.phase.step
        return f"<l2e.Handle: {method} in {', '.join(self.names)}; {step} steps; see state_dict()>"

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _empty_handle, ()

    def _live(self) -> None:
        if not hasattr(self, "controller"):
            raise ValueError(
                "l2e: this handle was copied or pickled together with a model and serves none: "
                "attach to the copy; to keep the statistics, save handle.state_dict() and give it "
                "to the new handle's load_state_dict()"
            )

    def _forget_pass(self) -> None:
        self._reminder.reset()
        self._pass.circumstances.clear()
        for hook in self._hooks:
            hook.terms.clear()
        self._loss = None if self._loss is None else self._loss.detach()

    def _refuse_to_be_left_behind(self) -> None:
        """A wrapper alone in a Join shadows its own collectives where inputs are out, not these."""
        if self._model_hook.joined and not self._join_config.enable:
            raise ValueError(
                "l2e: the model runs inside join(), which does not know this handle, so that ranks "
                "out of inputs would not step along: use `with Join([ddp_model, handle]):` of "
                "torch.distributed.algorithms.join instead"
            )

    def _agree_with_other_ranks(self) -> None:
        """All processes are taken for data-parallel ranks, which hold the same modules."""
        kind = zlib.crc32(repr((self.names, self.controller.config)).encode())
        if len({table[0][0] for table in self.controller.sharding.gather_data([[kind]])}) > 1:
            raise ValueError(
                "l2e: the processes of this torch.distributed attached different modules or "
                f"configurations, this one {', '.join(self.names)} with {self.controller.config}: "
                "say which of them hold the same modules (the ranks of one pipeline stage) with "
                "attach(..., sharding=l2e.Sharding(data_group=group)); Sharding() is this one alone"
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"l2e: {text}", stacklevel=4)

    def _warn_of_unused_loss(self) -> None:
        kept = any(hook.terms for hook in self._hooks)
        selecting = any(state.selecting for state in self.controller.states)
        regularizes = self.controller.config.method == "regularize"
        if kept and selecting and regularizes and not self._loss_was_taken:
            self._warn_once(
                "handle.loss() was not called in this step, so L_MS is in no loss: add it to the "
                "loss, or attach(..., inject=True) where the loss is out of reach"
            )
        self._loss_was_taken = False

    def _warn_of_replaced(self) -> None:
        for hook in self._hooks:
            if not matching.leads_to(self._model_hook.module, hook.name, hook.module):
                self._warn_once(
                    f"the model's {hook.name} is no longer the module that was attached (replaced, "
                    "wrapped or removed), and what stands there is not inhibited: detach(), attach "
                    "again, and give the new handle this one's state_dict()"
                )

    def _warn_of_unobserved(self) -> None:
        unobserved = self.controller.unobserved
        if not unobserved:
            return
        asleep = [h.name for h in self._hooks if h.name in unobserved and not h.module.training]
        uncalled = [name for name in unobserved if name not in asleep]
        why = []
        if asleep:
            why.append(f"{', '.join(asleep)} in eval mode (call model.train())")
        if uncalled:
            why.append(
                f"{', '.join(uncalled)} never called with gradients in training mode (a fused "
                "path or another forward passes it by, or it serves other inputs), or without a "
                "sample that counts (no rows, or all of them masked)"
            )
        warnings.warn(
            f"l2e: not observed in the first step: {'; '.join(why)}. L_MS is divided by all "
            f"{len(self.names)} matched layers all the same",
            stacklevel=4,
        )


class _StepAlong(JoinHook):
    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def main_hook(self) -> None:
        self.handle._step()


def _empty_handle() -> Handle:
    return Handle.__new__(Handle)


def _check_types(**arguments: Any) -> None:
    for name, value in arguments.items():
        kinds, remedy = ARGUMENTS[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            shown = repr(value) if isinstance(value, str | int | float) else type(value).__name__
            raise ValueError(f"l2e.attach: {name} is {shown}: expected {remedy}")


# What the arguments of `attach` may be, and what to do about others.
ARGUMENTS: dict[str, tuple[tuple[type, ...], str]] = {
    "model": ((nn.Module,), "a torch.nn.Module"),
    "config": ((L2EConfig,), "an l2e.L2EConfig; of a dict of its keys, L2EConfig(**keys)"),
    "neuron_dim": ((int, type(None)), "the number of one dimension of the outputs"),
    "output": ((str, int, type(None)), "the key, field or index of one part of the outputs"),
    "mask": (
        (str, type(None)),
        "the name of an argument of the model's forward; give tensors before each forward pass, "
        "with handle.mask(tensor)",
    ),
}


def _refuse_attached(name: str, module: nn.Module) -> None:
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, ModuleHook)]
    if any(hook.module is module for hook in hooks):
        raise ValueError(
            f"l2e.attach: module {name} has a handle already, beside which this one would count "
            "and change what that one has changed: detach() that first (the handle of an earlier "
            "attach), or match other modules"
        )


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that really steps inside accelerate's and Lightning's wrappers."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        if not isinstance(optimizer, torch.optim.Optimizer):
            break
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"l2e.attach: optimizer is a {type(optimizer).__name__}: expected a "
            "torch.optim.Optimizer; leave it out and call handle.step() after each of its steps"
        )
    return optimizer


def _graph_was_used(term: Tensor) -> bool:
    """A backward pass has gone through the term's graph and freed it."""
    if term.grad_fn is None:
        return False
    try:
        _ = term.grad_fn._raw_saved_tensors  # type: ignore[attr-defined]
    except RuntimeError:
        return True
    return False


def _guard_hooks_of_compiled_models() -> None:
    """Let torch.compile see hooks; without guards a graph of one instance serves all others."""
    import torch._dynamo

    if torch._dynamo.config.skip_nnmodule_hook_guards:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
