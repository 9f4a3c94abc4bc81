"""What a layer knows: running statistics and threshold, frozen while one optimizer step runs.

Held in plain float32 tensors outside the module, so that no engine casts, shards or averages
them. A layer adds to its sums in every forward pass; the controller merges them at step's end.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from l2e import backends, kernels
from l2e.backends import Backend
from l2e.config import DEFAULT_WEIGHT, L2EConfig
from l2e.sharding import Sharding
from l2e.statistics import Statistics
from l2e.threshold import BINS


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


class Sums:
    """What one step adds up for one layer: named views of one flat float32 buffer."""

    def __init__(self, sizes: dict[str, int], flat: Tensor) -> None:
        assert len(flat) == sum(sizes.values())
        self.sizes, self.flat = sizes, flat
        self.parts = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))

    @classmethod
    def zeros(cls, sizes: dict[str, int], device: torch.device) -> "Sums":
        return cls(sizes, torch.zeros(sum(sizes.values()), device=device))

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]


class LayerState:
    """State of one L2ELayer.

    Attributes:
        neurons: this process's neurons (a shard of `total_neurons` under tensor parallelism);
            of neuron_axes "position", times the number of positions.
        statistics, tau, share, updates: mean, var and m; the threshold; each neuron's running
            share of selected activations; and how many updates tau and share have had.
        std_at_start: activation standard deviation of the layer when inhibition started.
        mean_ms: the last batch's mean MS, in the units that tau is in; NaN before there was one.
        drift: what log tau moves by in each step beside its corrections.
        lm_gradient, ms_gradient, ratio_updates: of a `gradient_ratio`, running means of the root
            mean squares of the gradient that arrives and of L_MS's at weight 1, both of one
            sample's loss; and how many steps are in them.
        weight: of L_MS in this step.
        bad_step: the first step with a NaN or Inf activation, -1 if there was none.
        started: sums of this step are taken around `statistics.mean`.
        empty: no batch was merged yet, on any rank.
        waiting: it has not had its start, the first step from the late start on that could be
            used: with samples, all of them finite, and for tau with earlier statistics.
        waited: how many steps it could have had its start in and did not.
        shape_from_data: only activations tell the number of neurons.
        centre_rank: the data-parallel rank whose centre the first batch is summed around.
    """

    RATIO = ("lm_gradient", "ms_gradient", "ratio_updates")
    SAVED = ("share", "tau", "updates", "mean_var", "std_at_start", "mean_ms", "drift", *RATIO)
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
        self.weight: Tensor | float = DEFAULT_WEIGHT if config.weight is None else config.weight
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
        self.units, self.total_units = units, self.total_units or units
        self.positions = positions
        self.statistics = Statistics.empty(self.neurons, device)
        self.share = torch.zeros(self.neurons, device=device)
        self.tau = torch.tensor(float("inf"), device=device)
        self.updates = torch.zeros((), device=device)
        self.std_at_start = torch.tensor(float("nan"), device=device)
        self.mean_ms = torch.tensor(float("nan"), device=device)
        self.drift = torch.zeros((), device=device)
        self.lm_gradient = torch.zeros((), device=device)
        self.ms_gradient = torch.zeros((), device=device)
        self.ratio_updates = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.refresh(torch.zeros((), device=device))
        self.reset_sums()

    @property
    def neurons(self) -> int:
        return self.units * self.positions

    @property
    def total_neurons(self) -> int:
        return self.total_units * self.positions

    @property
    def device(self) -> torch.device:
        return self.tau.device

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
        return self.starting and self.phase.observed is not None

    @property
    def may_start(self) -> bool:
        return self.starting and not (self.observing and self.empty)

    def note(self, usable: bool) -> None:
        """Learn at a step's end whether it had samples, all of them finite."""
        self.waiting = self.waiting and not (usable and self.may_start)
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

    def to(self, device: torch.device) -> None:
        if self.device == device:
            return
        move = {name: getattr(self, name).to(device) for name in (*self.SAVED, "bad_step")}
        self.__dict__.update(move)
        old = self.statistics
        self.statistics = Statistics(
            *(t.to(device) for t in (old.mean, old.mean_low, old.var, old.samples))
        )
        self.refresh(self.mean_var)
        self.reset_sums()

    def refresh(self, mean_var: Tensor) -> None:
        """Derive what the next step's forward passes compare with.

        Args:
            mean_var: [], mean of var over the whole layer, of all shards.
        """
        self.mean_var = mean_var
        var = self.statistics.var
        # A layer of constants: nothing deviates, nothing is selected.
        tiny = torch.finfo(torch.float32).tiny
        self.denominator = (var + self.config.eps * mean_var).clamp(min=tiny)
        self.threshold = (self.tau * self.denominator).clamp(min=tiny)
        self.balance = torch.where(var > 0, self.share / var, 0)
        if self.config.gradient_ratio is not None:
            known = self.config.gradient_ratio * self.lm_gradient / self.ms_gradient
            self.weight = torch.where(self.ratio_updates > 0, known, DEFAULT_WEIGHT)

    def reset_sums(self) -> None:
        n, scalar = self.neurons, 1
        sizes = {
            "deviation": n,
            "square": n,
            "selected": n,
            "log_square": scalar,
            "samples": scalar,
            "gradient_squares": 3,
        }
        measured = {
            "fourth": n,
            "largest": self.sharding.data_size,
            "histogram": 2 * BINS,
            "output_square": scalar,
            "residual_square": scalar,  # right after output_square: measured_squares
        }
        self.sums = Sums.zeros(sizes, self.device)
        self.measured = Sums.zeros(measured, self.device)
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=self.device)

    @property
    def core_sums(self) -> Tensor:
        """The part of the sums that the kernels add to: [3, neurons] and one entry, flat."""
        return self.sums.flat[: 3 * self.neurons + 1]

    @property
    def measured_squares(self) -> Tensor:
        """[2]: the sums of squares of MLP output and residual stream."""
        return self.measured.flat[-2:]

    def join(self, phase: Phase, sharding: Sharding) -> None:
        """Be led by a controller."""
        self.phase, self.sharding = phase, sharding
        if self.positions:
            self.reset_sums()

    def place(self, sharding: Sharding) -> None:
        """Take part in other process groups, with what was summed so far."""
        self.sharding = sharding
        if not self.positions:
            return
        sums, measured, counts = self.sums, self.measured, self.counts
        self.reset_sums()
        self.sums, self.counts = sums, counts
        for name, values in measured.parts.items():
            own = values if name != "largest" else values.max()
            slot = slice(None) if name != "largest" else sharding.data_rank
            self.measured[name][slot] = own

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
    ) -> kernels.KernelArguments:
        """What the kernels do in this step, with biases [units] if they are still to be added."""
        balanced = self.config.scale_invariant and threshold is not None
        return kernels.KernelArguments(
            activation=self.activation,
            method=self.config.method,
            delta=self.config.delta,
            mean=self.statistics.mean,
            threshold=threshold,
            balance=self.balance if balanced else None,
            replacement=replacement,
            bias=bias if bias is None or self.positions == 1 else bias.repeat(self.positions),
            least=self.threshold if self.config.selection == "random" else None,
        )

    def backend(self, rows: Tensor, arguments: kernels.KernelArguments) -> Backend:
        """Whose kernels take `rows` [samples, neurons]."""
        return backends.choose(
            self.config,
            rows.device,
            rows.dtype,
            neurons=self.neurons,
            activation=self.activation,
            biased=arguments.bias is not None,
        )

    def saved(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, this process's shard; neurons last."""
        tensors = {name: getattr(self, name) for name in self.SAVED}
        tensors |= vars(self.statistics)
        return {
            name: value.view(self.positions, self.units)
            if value.dim() and self.config.neuron_axes == "position"
            else value
            for name, value in tensors.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `saved` gave, gathered over all shards; keeps this process's shard."""
        names = (*Statistics.__dataclass_fields__, *self.SAVED)
        if set(tensors) == {"samples"}:  # never called when it was saved
            if self.positions:
                self.allocate(self.units, self.positions, self.device)
            self.started, self.empty, self.waiting, self.waited = False, True, True, 0
            return
        tensors = {name: torch.tensor(value) for name, value in self.ADDED_LATER.items()} | tensors
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"l2e state of layer {self.name}: no entries {missing}")
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
            name: (
                self.sharding.own_neurons(tensors[name]).flatten()
                if tensors[name].dim()
                else tensors[name]
            )
            .detach()
            .to(device, torch.float32, copy=True)
            for name in names
        }
        self.statistics = Statistics(
            **{name: own[name] for name in Statistics.__dataclass_fields__}
        )
        for name in self.SAVED:
            setattr(self, name, own[name])
        self.started = not (empty := bool(self.statistics.samples == 0))
        self.empty = empty
        has_start = math.isfinite(self.tau) or self.config.selection == "topk"
        self.waiting, self.waited = empty or not has_start or not self.phase.selecting, 0
        self.refresh(self.mean_var)
