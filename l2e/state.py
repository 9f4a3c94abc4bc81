"""What a layer knows: running statistics and threshold, frozen while one optimizer step runs.

Held in plain float32 tensors outside the module, so that no engine casts, shards or averages
them: a row of the stack of all layers of its width. A layer adds to its sums in every forward
pass; the controller merges them at step's end.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from l2e import backends, kernels
from l2e.backends import Backend
from l2e.config import L2EConfig
from l2e.sharding import Sharding
from l2e.stack import Flags, Metrics, Running, Stack, Sums
from l2e.statistics import Statistics


@dataclass
class Phase:
    """Where training stands; one object shared by the controller and all its layers.

    Attributes:
        step: optimizer steps merged so far, which is the number of the running step.
        start: the first step that selects.
        observed: the first step whose histogram may give tau its start; None for topk.
        measure: also compute what is only logged.
        gradient_scale: what an injected gradient is multiplied by (loss scale / micro-batches).
    """

    step: int = 0
    start: int = 0
    observed: int | None = None
    measure: bool = False
    gradient_scale: float = 1.0

    @classmethod
    def of(cls, config: L2EConfig) -> "Phase":
        """At step 0. MS exists from step 1 on, a threshold from the step after."""
        if config.selection != "topk":
            start = max(config.late_start_step, 2)
            return cls(start=start, observed=start - 1)
        return cls(start=max(config.late_start_step, 0 if config.memel_code_compat else 1))

    @property
    def selecting(self) -> bool:
        return self.step >= self.start


class LayerState:
    """State of one L2ELayer.

    Attributes:
        neurons: this process's neurons (a shard of `total_neurons` under tensor parallelism);
            of neuron_axes "position", times the number of positions.
        stack, row: where its tensors are.
        squares: the stack's, of this row.
        started: sums of this step are taken around `mean`.
        empty: no batch was merged yet, on any rank.
        waiting: it has not had its start, the first step from the late start on that could be
            used: with samples, all of them finite, and for tau with earlier statistics, of neurons
            that vary (without variance there is no MS).
        waited: how many steps it could have had its start in and did not.
        shape_from_data: only activations tell the number of neurons.
        centre_rank: the data-parallel rank whose centre the first batch is summed around.
    """

    SAVED = tuple(name for name in Running._fields if name != "bad_age")
    RATIO = ("lm_gradient", "ms_gradient", "ratio_updates")
    ADDED_LATER: ClassVar = {  # older checkpoints lack them
        "mean_ms": float("nan"),
        "drift": 0.0,
        **dict.fromkeys(RATIO, 0.0),
    }

    def __init__(
        self,
        name: str,
        units: int | None,
        config: L2EConfig,
        *,
        activation: str | None,
        inhibited_layers: int,
        total_units: int | None,
    ) -> None:
        self.name, self.config, self.activation = name, config, activation
        self.units, self.total_units = units or 0, total_units or units or 0
        self.inhibited_layers = inhibited_layers
        self.phase = Phase()
        self.sharding = Sharding()
        self.positions = 0
        self.started, self.empty, self.waiting, self.waited = False, True, True, 0
        self.shape_from_data = units is None or config.neuron_axes == "position"
        self.centre_rank = 0
        if units is not None and not self.shape_from_data:
            self.allocate(units, 1, torch.device("cpu"))

    def allocate(self, units: int, positions: int, device: torch.device) -> None:
        """Make the state of `positions` x `units` neurons, where only data tells how many."""
        self.units = units
        self.total_units = self.total_units or units * self.sharding.tensor_size
        self.positions = positions
        self._start_from(Running.empty(self.neurons, device))

    def _start_from(self, running: Running) -> None:
        """Be the one row of `running`, with nothing summed up."""
        metrics = Metrics.empty(self.total_neurons, running.tau.device)
        self.be(Stack(running, metrics, self.config, self.sharding.data_size), 0)

    def be(self, stack: Stack, row: int) -> None:
        """Have this row of `stack` from now on."""
        self.stack, self.row = stack, row
        self.squares = stack.squares[row]

    @property
    def neurons(self) -> int:
        return self.units * self.positions

    @property
    def total_neurons(self) -> int:
        return self.total_units * self.positions

    @property
    def device(self) -> torch.device:
        return self.stack.device

    @property
    def running(self) -> Running:
        return Running(*(tensor[self.row] for tensor in self.stack.running))

    @property
    def metrics(self) -> Metrics:
        return Metrics(*(tensor[self.row] for tensor in self.stack.metrics))

    @property
    def statistics(self) -> Statistics:
        """Mean, var and m, frozen during a step."""
        return Statistics(*(tensor[self.row] for tensor in self.stack.running.statistics))

    @property
    def mean(self) -> Tensor:
        """That sums are taken around in this step."""
        return self.stack.running.mean[self.row]

    @property
    def denominator(self) -> Tensor:
        return self.stack.derived.denominator[self.row]

    @property
    def threshold(self) -> Tensor:
        return self.stack.derived.threshold[self.row]

    @property
    def balance(self) -> Tensor:
        return self.stack.derived.balance[self.row]

    @property
    def weight(self) -> Tensor | float:
        """Of L_MS in this step."""
        fixed = self.config.weight
        return self.stack.derived.weight[self.row] if fixed is None else fixed

    @property
    def sums(self) -> Sums:
        return self.stack.sums.row(self.row)

    @property
    def samples(self) -> Tensor:
        """[1], how many this step's sums are of so far."""
        return self.stack.sums["samples"][self.row]

    @property
    def measured(self) -> Sums:
        return self.stack.measured.row(self.row)

    @property
    def counts(self) -> Tensor:
        return self.stack.counts[self.row]

    @property
    def selecting(self) -> bool:
        """Activations are selected in this step; MEmeL's code asks for no earlier statistics."""
        return self.phase.selecting and (not self.waiting or self.config.memel_code_compat)

    @property
    def starting(self) -> bool:
        """This step may be the layer's start."""
        return self.waiting and self.phase.step >= self.phase.start - 1

    @property
    def observing(self) -> bool:
        """A histogram of this step may give tau its start."""
        return self.starting and self.phase.observed is not None and not self.empty

    @property
    def may_start(self) -> bool:
        return self.starting and not (self.phase.observed is not None and self.empty)

    def note(self, usable: bool, starts: bool) -> None:
        """Learn at a step's end what `merging.Merged` says of it."""
        self.waiting = self.waiting and not starts
        self.empty = self.empty and not usable
        self.started = not self.empty

    @property
    def measuring(self) -> bool:
        """Without statistics there is nothing to measure by."""
        return not self.empty and (self.phase.measure or self.observing)

    @property
    def comparing(self) -> bool:
        """The backward pass compares L_MS's gradient with the one that arrives."""
        asked = self.phase.measure or self.config.gradient_ratio is not None
        return asked and self.selecting and self.config.method == "regularize"

    @property
    def flags(self) -> tuple[bool, ...]:
        """As in `Flags`."""
        return tuple(getattr(self, name) for name in Flags._fields)

    def to(self, device: torch.device) -> None:
        if self.device != device:
            self.be(Stack.joined([(self.stack, self.row)], device), 0)

    def _all_sums(self) -> list[Tensor]:
        return [self.sums.flat, self.measured.flat, self.counts, self.squares]

    def reset_sums(self) -> None:
        for sums in self._all_sums():
            sums.zero_()

    def summed(self) -> list[Tensor]:
        """A copy of what this step has summed up so far; none before the layer was called."""
        return [sums.clone() for sums in self._all_sums()] if self.positions else []

    def restore(self, summed: list[Tensor]) -> None:
        """Let what `summed` gave be all of this step's sums."""
        if not summed and self.positions:
            self.reset_sums()
            self.started = False
        for sums, before in zip(self._all_sums() if summed else [], summed, strict=True):
            sums.copy_(before)

    @property
    def core_sums(self) -> Tensor:
        """The part of the sums that the kernels add to: [3, neurons] and one entry, flat."""
        return self.stack.sums.flat[self.row, : 3 * self.neurons + 1]

    def join(self, phase: Phase, sharding: Sharding) -> None:
        """Be led by a controller, from nothing summed up on."""
        self.phase = phase
        self.place(sharding)
        if self.positions:
            self.reset_sums()

    def place(self, sharding: Sharding) -> None:
        """Take part in other process groups, with what was summed so far."""
        self.sharding = sharding
        if self.positions:
            self.be(self.stack.row_in(self.row, sharding), 0)

    def expected_selected(self, rows: int) -> float:
        """How many activations of the whole layer are selected among `rows` samples, over time."""
        if self.config.selection == "topk":
            return self.config.topk * rows
        return self.config.inhibit_fraction * self.total_neurons * rows

    def loss_factor(self, rows: int) -> Tensor | float:
        """L_MS is this times the sum over selected entries of log (z - mean)^2 (L2E, Eq. 5)."""
        return self.weight / (self.inhibited_layers * self.expected_selected(rows))

    def compare(self, squares: Tensor, loss_gradient: Tensor | float) -> None:
        """Add what one backward pass gave to the sums of squares of gradients.

        These are of the gradient that arrived, of the one that L_MS added, and of that without its
        factor. The last counts a pass in which L_MS has no part too, which cancels in the weight.

        Args:
            squares: [2], as `kernels.backward` gives them.
            loss_gradient: the factor of L_MS's gradient there.
        """
        arrived, direction = squares
        sums = self.sums["gradient_squares"]
        sums[0] += arrived
        sums[1] += (2 * loss_gradient) ** 2 * direction
        sums[2] += 4 * direction

    def kernel_arguments(
        self,
        threshold: Tensor | None,
        replacement: Tensor | None = None,
        bias: Tensor | None = None,
        activated: bool = False,
    ) -> kernels.KernelArguments:
        """What the kernels do in this step, with biases [units] if they are still to be added, to
        what is still to be `activated` or has been."""
        balanced = self.config.scale_invariant and threshold is not None
        return kernels.KernelArguments(
            activation=None if activated else self.activation,
            method=self.config.method,
            delta=self.config.delta,
            mean=self.mean,
            threshold=threshold,
            balance=self.balance if balanced else None,
            replacement=replacement,
            bias=bias if bias is None or self.positions == 1 else bias.repeat(self.positions),
            least=self.threshold if self.config.selection == "random" else None,
        )

    def backend(self, rows: Tensor, arguments: kernels.KernelArguments | None = None) -> Backend:
        """Whose kernels take `rows` [samples, neurons]; without arguments, activations that have
        bias and non-linearity behind them."""
        return backends.choose(
            self.config,
            rows.device,
            rows.dtype,
            neurons=self.neurons,
            activation=None if arguments is None else arguments.activation,
            biased=arguments is not None and arguments.bias is not None,
        )

    def saved(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, this process's shard; neurons last."""
        running = self.running._asdict()
        tensors = {name: running[name] for name in self.SAVED}
        return {
            name: value.view(self.positions, self.units)
            if value.dim() and self.config.neuron_axes == "position"
            else value
            for name, value in tensors.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `saved` gave, gathered over all shards; keeps this process's shard."""
        if set(tensors) == {"samples"} and not tensors["samples"]:  # never called when it was saved
            if self.positions:
                self.allocate(self.units, self.positions, self.device)
            self.started, self.empty, self.waiting, self.waited = False, True, True, 0
            return
        tensors = {name: torch.tensor(value) for name, value in self.ADDED_LATER.items()} | tensors
        missing = [name for name in self.SAVED if name not in tensors]
        if missing:
            raise ValueError(
                f"l2e state of layer {self.name}: no entries {', '.join(missing)}; load the whole "
                "of what was saved, also where this handle's state_dict(), of a layer that was not "
                "called yet, has fewer (a distributed checkpoint reads only those)"
            )
        by_position = self.config.neuron_axes == "position"
        positions = len(tensors["mean"]) if by_position else 1
        total = self.total_units or tensors["mean"].shape[-1]
        full = (positions, total) if by_position else (total,)
        for name in ("mean", "mean_low", "var", "share"):
            if tensors[name].shape != full:
                raise ValueError(
                    f"l2e state of layer {self.name}: {name} has shape "
                    f"{list(tensors[name].shape)}, this model needs {list(full)}"
                )
        device = self.device if self.positions else torch.device("cpu")
        self.allocate(total // self.sharding.tensor_size, positions, device)
        own = {
            name: self.sharding.own_neurons(full).flatten() if full.dim() else full
            for name, full in tensors.items()
            if name in self.SAVED
        }
        rows = {n: t.detach()[None].to(device, torch.float32, copy=True) for n, t in own.items()}
        self._start_from(Running(**rows, bad_age=self.stack.running.bad_age))
        self.started = not (empty := bool(own["samples"] == 0))
        self.empty = empty
        has_start = math.isfinite(own["tau"]) or self.config.selection == "topk"
        self.waiting, self.waited = empty or not has_start or not self.phase.selecting, 0
