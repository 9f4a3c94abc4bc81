"""Put the method into any PyTorch model, by module names, in two lines.

handle = l2e.attach(model, "transformer.h.*.mlp.act", config)
...
(task_loss + handle.loss()).backward(); optimizer.step(); handle.step()
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l2e import inhibition
from l2e.config import L2EConfig, select_layers
from l2e.controller import Controller
from l2e.layer import L2ELayer
from l2e.sharding import Sharding

if TYPE_CHECKING:
    from transformers import TrainerCallback


def attach(
    model: nn.Module,
    pattern: str,
    config: L2EConfig,
    *,
    neuron_dim: int = -1,
    inject: bool = False,
    sharding: Sharding | None = None,
) -> Handle:
    """Observe and inhibit the forward outputs of modules of `model`.

    Args:
        pattern: of module names, with * for any text; `config.layers` chooses among those that
            match, in the model's order.
        neuron_dim: the dimension of an output that counts its neurons (1 for images
            [batch, channels, height, width]). Of an output that is a tuple, as of an LSTM cell,
            the first tensor is meant.
        inject: add L_MS's gradient in the backward pass, for training loops whose loss is out of
            reach; `handle.controller.gradient_scale` is its factor. Otherwise add `handle.loss()`
            to the loss.
        sharding: process groups; by default all processes of an initialised torch.distributed
            are data-parallel ranks, as under DDP and FSDP.

    Raises:
        ValueError: no module matches, or `config.layers` names one that is not there.
    """
    modules = {name: module for name, module in model.named_modules() if fnmatchcase(name, pattern)}
    if not modules:
        leaves = [name for name, module in model.named_modules() if not list(module.children())]
        raise ValueError(
            f"l2e.attach: no module's name matches {pattern!r}; names of this model are, for "
            f"example, {', '.join(leaves[:: max(1, len(leaves) // 8)][:8])}"
        )
    if sharding is None:
        sharding = Sharding(data_group=dist.group.WORLD if dist.is_initialized() else None)
    names = list(modules)
    chosen = [names[number] for number in select_layers(config.layers, len(names))]
    return Handle({name: modules[name] for name in chosen}, config, neuron_dim, inject, sharding)


class Handle:
    """The method at work in a model, until `detach()`.

    Attributes:
        names: the modules whose outputs are inhibited.
        controller: for `measure`, `gradient_scale`, `histograms()`.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        config: L2EConfig,
        neuron_dim: int,
        inject: bool,
        sharding: Sharding,
    ) -> None:
        self.names = list(modules)
        self.layers = [
            L2ELayer(None, config, activation=None, name=name, inhibited_layers=len(modules))
            for name in modules
        ]
        self.controller = Controller(self.layers, config, sharding)
        self.controller.gradient_scale = 1.0 if inject else 0.0
        self.inject = inject
        self._terms: list[list[tuple[Tensor, int]]] = [[] for _ in modules]
        self._hooks = [
            module.register_forward_hook(_hook(layer, None if inject else terms, neuron_dim))
            for module, layer, terms in zip(modules.values(), self.layers, self._terms, strict=True)
        ]

    def loss(self) -> Tensor:
        """L_MS of the forward passes since the last call: add it to the micro-batch's loss.

        A float32 scalar, the mean over all samples of these passes; 0 unless the method is
        "regularize", and where L_MS is injected. Reentrant activation checkpointing runs its
        forward passes without gradients: use inject=True with it, or use_reentrant=False.
        """
        device = next((term.device for terms in self._terms for term, _ in terms), None)
        total = torch.zeros((), device=device)
        for layer, terms in zip(self.layers, self._terms, strict=True):
            if terms and layer.config.method == "regularize":
                samples = sum(entries for _, entries in terms) // layer.state.neurons
                logs = torch.stack([term for term, _ in terms]).sum()
                total = total + layer.state.loss_factor(samples) * logs
            terms.clear()
        return total

    def step(self) -> None:
        """Merge what was observed; call it once after each optimizer step, on every rank."""
        for terms in self._terms:
            terms.clear()
        self.controller.step()

    def metrics(self) -> dict[str, dict[str, float]]:
        """As `Controller.metrics`."""
        return self.controller.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        """As `Controller.state_dict`; the model's own state dict holds nothing of the method."""
        return self.controller.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """As `Controller.load_state_dict`."""
        self.controller.load_state_dict(tensors)

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        for hook in self._hooks:
            hook.remove()

    def trainer_callback(self) -> TrainerCallback:
        """For `transformers.Trainer(callbacks=[...])`; needs attach(..., inject=True)."""
        from transformers import TrainerCallback

        if not self.inject:
            raise ValueError(
                "l2e: a Trainer computes its own loss; use attach(..., inject=True), which adds "
                "L_MS's gradient in the backward pass"
            )
        controller = self.controller

        class StepCallback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if args.fp16:
                    raise ValueError(
                        "l2e: fp16 = True: the Trainer does not tell callbacks its loss scale, "
                        "which L_MS's gradient needs; use bf16 = True"
                    )
                controller.gradient_scale = 1 / args.gradient_accumulation_steps

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                controller.step()

        return StepCallback()


def _hook(layer: L2ELayer, terms: list[tuple[Tensor, int]] | None, neuron_dim: int) -> Any:
    """A forward hook that puts a module's inhibited output in the place of its output."""

    def inhibit(module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training:
            return None
        z = output[0] if isinstance(output, tuple) else output
        inhibited, logs, _ = layer.operate(z.movedim(neuron_dim, -1))
        recomputing = not torch.compiler.is_compiling() and inhibition.in_backward()
        if terms is not None and torch.is_grad_enabled() and not recomputing:
            terms.append((logs, z.numel()))
        inhibited = inhibited.movedim(-1, neuron_dim)
        return (inhibited, *output[1:]) if isinstance(output, tuple) else inhibited

    return inhibit
