"""What runs at an attached module's output, and what the hooks of one handle share."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from l2e import inhibition, matching, outputs, pull
from l2e.copies import OwnHook, tell_of_copy
from l2e.layer import L2ELayer
from l2e.reminder import StepReminder

# How torch's modules name the number of their neurons, which are an output's last dimension, or
# the first after the batch.
WIDTHS = {"out_features": -1, "out_channels": 1, "num_features": 1, "num_channels": 1}
WITH_WIDTHS = (nn.Linear, nn.Bilinear, _ConvNd, _NormBase, nn.GroupNorm)
# What autograd calls operations on [batch, channels, ...], and some that keep dimensions in place.
ON_CHANNELS = ("ConvolutionBackward", "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm")
_ACTIVATIONS = ("Relu", "LeakyRelu", "Gelu", "Silu", "Elu", "Tanh", "Sigmoid")
ELEMENTWISE = (*_ACTIVATIONS, "AddBackward", "MulBackward", "NativeDropout")


class ForwardPass:
    """What the hooks of one handle know of the running forward pass.

    Attributes:
        paused: nothing is observed or changed.
        observe_no_grad: passes without gradients are, in training mode.
        collects: the losses are kept for `Handle.loss()`; otherwise the backward pass injects
            their gradient.
        counted: true where a sample counts; None: all do.
        reminder: learns that something was observed.
        evaluated: the model's last pass was one in eval mode.
        masked_inside: how many passes of the model run whose argument is the mask; None if masks
            do not come from an argument.
        circumstances: whether it was paused, and the mask, of each kind of pass with gradients
            since the last backward pass that recomputed one (activation checkpointing).
    """

    def __init__(self, observe_no_grad: bool, collects: bool, reminder: StepReminder) -> None:
        self.paused = False
        self.observe_no_grad, self.collects = observe_no_grad, collects
        self.counted: Tensor | None = None
        self.reminder = reminder
        self.evaluated = False
        self.masked_inside: int | None = None
        self.circumstances: list[tuple[bool, Tensor | None]] = []
        self.recomputed = False

    def observes(self, module: nn.Module, name: str) -> bool:
        if not module.training:
            return False
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._follow_recomputation()
        if self.paused:
            return False
        if torch.is_grad_enabled() or self.observe_no_grad:
            self._refuse_old_mask(name)
            return True
        if torch.compiler.is_compiling() or not _in_checkpointed_function():
            return False
        if self.collects:
            raise ValueError(
                f"l2e: module {name} runs under reentrant activation checkpointing, which hides "
                "its graph from handle.loss(): use use_reentrant=False, or attach(..., inject=True)"
            )
        return True

    def _refuse_old_mask(self, name: str) -> None:
        if torch.compiler.is_compiling() or inhibition.in_backward():
            return
        if self.masked_inside == 0:
            raise ValueError(
                f"l2e: module {name} is called outside the forward pass of the model, which takes "
                "the mask, so which samples count is not known: call the model, attach to the "
                "part that is called, or attach without mask= and give masks with "
                "handle.mask(tensor)"
            )

    def _follow_recomputation(self) -> None:
        """Activation checkpointing runs a pass again, which has to be the pass it was.

        Raises:
            ValueError: passes of different kinds were run, and one of them is recomputed.
        """
        recomputing = inhibition.in_backward()
        if self.recomputed and not recomputing:  # the first pass after a backward pass
            self.circumstances.clear()
        self.recomputed = recomputing
        now = (self.paused, self.counted)
        if not any(paused == now[0] and mask is now[1] for paused, mask in self.circumstances):
            self.circumstances.append(now)
        if recomputing and len(self.circumstances) > 1:
            raise ValueError(
                "l2e: activation checkpointing recomputes one of several passes that had different "
                "masks, or of which some were paused, and cannot tell which: call backward() after "
                "each such pass, before the next, and inside the same `with handle.paused():`"
            )


class ModuleHook(OwnHook):
    """Puts a module's inhibited output in the place of its output.

    Attributes:
        terms: of the forward passes since they were last taken: the sum over selected entries of
            log (z - mean)^2, and the number of entries that counted.
        calls: since its owner's forward began; None before it first did.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: L2ELayer,
        forward_pass: ForwardPass,
        neuron_dim: int | None,
        output: outputs.Key | None,
    ) -> None:
        super().__init__(module)
        self.layer, self.name = layer, layer.state.name
        self.forward_pass = forward_pass
        self.neuron_dim, self.output = neuron_dim, output
        named = [name for name in WIDTHS if isinstance(getattr(module, name, None), int)]
        self.width: int = getattr(module, named[0]) if named else 0
        self.width_dim = WIDTHS[named[0]] if named else None
        self.terms: list[tuple[Tensor, Tensor | int]] = []
        self.calls: int | None = None
        self.told = self.frozen_told = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module is not self.module:
            self._refuse_replicas(module)
            if not torch.compiler.is_compiling():
                tell_of_copy(module)
            return None
        if not self.forward_pass.observes(module, self.name):
            return None
        self.forward_pass.reminder.observed = True
        if torch.compiler.is_compiling():
            return self._apply(output)
        self._count_call()
        if torch.is_inference_mode_enabled():  # the layer's state outlives this pass
            with torch.inference_mode(False), torch.no_grad():
                return self._apply(output)
        return self._apply(output)

    def _apply(self, output: Any) -> Any:
        z = outputs.find(output, self.output, self.name)
        if z.is_meta:
            return None
        neuron_dim = self._dimension(z)
        self._check(z)
        self._tell_of_frozen(z)
        counted = self.forward_pass.counted
        inject = not self.forward_pass.collects
        if pull.serves(self.layer.state, z) and pull.may_replace(z):
            found, logs = pull.pull(z, counted, self.layer.state, neuron_dim, inject)
            inhibited = None if found is z else found
        elif self.layer.config.method == "none":
            logs = inhibition.observe(z.detach(), counted, self.layer.handle, neuron_dim)
            inhibited = None
        else:
            inhibited, logs, _ = self.layer.operate(z, None, counted, neuron_dim)
        if not inject:
            self._keep(logs, z, counted)
        return None if inhibited is None else outputs.replace(output, z, inhibited)

    def _tell_of_frozen(self, z: Tensor) -> None:
        pulls = self.layer.config.method == "regularize" and torch.is_grad_enabled()
        if z.requires_grad or not pulls or self.frozen_told or torch.compiler.is_compiling():
            return
        self.frozen_told = True
        warnings.warn(
            f"l2e: nothing that is trained comes before module {self.name}, whose output requires "
            "no gradient: it is observed, and L_MS has nothing to change there. Unfreeze what "
            "comes before it, or leave it out of the pattern",
            stacklevel=3,
        )

    def _keep(self, logs: Tensor, z: Tensor, counted: Tensor | None) -> None:
        if not torch.is_grad_enabled():
            return
        if not torch.compiler.is_compiling() and inhibition.in_backward():
            return  # the pass is recomputed
        entries: Tensor | int = z.numel()
        if counted is not None:  # each stands for so many samples
            entries = (counted != 0).sum() * (z.numel() // counted.numel())
        self.terms.append((logs, entries))

    def _count_call(self) -> None:
        """Tell of what has no weights and stands in several places of its owner's forward."""
        if self.calls is None or inhibition.in_backward():
            return
        self.calls += 1
        if self.calls == 2 and not self.told and next(self.module.parameters(), None) is None:
            self.told = True
            warnings.warn(
                f"l2e: module {self.name} has no weights and is called several times in one pass, "
                "as if all calls saw the same neurons: that is right for a step over time; where "
                "they stand behind different layers, give each place a module of its own",
                stacklevel=2,
            )

    def _dimension(self, z: Tensor) -> int:
        """The dimension of an output that counts its neurons.

        Raises:
            ValueError: it was not named and cannot be known, or another one has them.
        """
        shape = f"l2e: module {self.name}: its output has shape {list(z.shape)}"
        if self.neuron_dim is None:
            images = isinstance(self.module, _ConvNd) or z.dim() > 2  # one image has no batch
            channels = self.width_dim == 1 and images
            if channels or self._behind_channels(z) or (z.dim() > 3 and self.width_dim is None):
                raise ValueError(
                    f"{shape}: tell attach which dimension counts its neurons, neuron_dim = 1 for "
                    "[batch, channels, height, width] or -1 for the last one"
                )
        dim = -1 if self.neuron_dim is None else self.neuron_dim
        if not -z.dim() <= dim < z.dim():
            raise ValueError(
                f"{shape}, which has no dimension neuron_dim = {dim}; name the one that counts its "
                "neurons"
            )
        found = z.shape[dim]
        # Elsewhere these names may mean something else, such as the inputs; then neuron_dim tells.
        certain = self.neuron_dim is None or isinstance(self.module, WITH_WIDTHS)
        if certain and self.width not in (0, found):
            raise ValueError(
                f"l2e: module {self.name} has {self.width} neurons, but dimension neuron_dim = "
                f"{dim} of its output {list(z.shape)} counts {found}; use neuron_dim = "
                f"{next((d for d, n in enumerate(z.shape) if n == self.width), dim)}"
            )
        return dim

    def _behind_channels(self, z: Tensor) -> bool:
        """Whether, at its first call, nothing stands between it and a convolution that could have
        moved the channels [batch, channels, length]."""
        if z.dim() != 3 or self.width_dim is not None or self.layer.state.positions:
            return False
        nodes = [] if torch.compiler.is_compiling() else [z.grad_fn]
        for node in nodes:
            if node is not None and node.name().startswith(ON_CHANNELS):
                return True
            if node is not None and node.name().startswith(ELEMENTWISE):
                nodes += [before for before, _ in node.next_functions if before not in nodes]
        return False

    def _check(self, z: Tensor) -> None:
        """Refuse what the method cannot be applied to, in one sentence."""
        # In a graph of PyTorch 2.11 is_exporting() is always true.
        if torch.jit.is_tracing() or torch.compiler._is_exporting_flag:
            raise ValueError(
                f"l2e: module {self.name} is traced in training mode, and a trace would keep this "
                "step's threshold for ever: call model.eval() before it, or handle.detach()"
            )
        if torch.compiler.is_compiling():
            return
        if z.layout is not torch.strided or z.is_nested or hasattr(z, "device_mesh"):
            raise ValueError(
                f"l2e: module {self.name} returned a {type(z).__name__} of layout {z.layout}; the "
                "method needs a plain dense tensor: match a module that gives one"
            )
        if torch._C._functorch.maybe_current_level() is not None or _has_tangent(z):
            raise ValueError(
                f"l2e: module {self.name} runs inside torch.func or forward-mode differentiation, "
                "which the method does not follow: run this pass inside `with handle.paused():`"
            )

    def _refuse_replicas(self, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):
            raise ValueError(
                f"l2e: module {self.name} is a replica of nn.DataParallel, whose threads would "
                "count its samples at once: use DistributedDataParallel"
            )


class OwnerHook(OwnHook):
    """Before the forward pass of a module that calls attached ones: their calls count anew."""

    def __init__(self, module: nn.Module, hooks: list[ModuleHook]) -> None:
        super().__init__(module)
        self.hooks = hooks

    @classmethod
    def of(cls, model: nn.Module, hooks: list[ModuleHook]) -> list[OwnerHook]:
        owned: dict[nn.Module, list[ModuleHook]] = {}
        for hook in hooks:
            owned.setdefault(matching.owner(model, hook.module), []).append(hook)
        return [cls(module, hooks) for module, hooks in owned.items()]

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            for hook in self.hooks:
                hook.calls = 0


def _has_tangent(z: Tensor) -> bool:
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(z).tangent is not None


def _in_checkpointed_function() -> bool:
    """Inside the forward of an autograd function, as reentrant activation checkpointing is.

    Its pass runs without gradients, and is the one that counts: the second, with gradients, is
    a recomputation.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
