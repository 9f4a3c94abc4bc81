"""The tensors of all layers of one width, stacked: one operation serves them all, however many.

Everything is float32 [layers, neurons] or [layers]; a layer reads and adds to its own row.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from l2e.config import DEFAULT_WEIGHT, L2EConfig
from l2e.sharding import Sharding
from l2e.statistics import Statistics
from l2e.threshold import BINS

TINY = torch.finfo(torch.float32).tiny


class Running(NamedTuple):
    """What layers know from earlier steps; frozen while a step runs.

    Attributes:
        mean, mean_low, var, samples: as in `Statistics`.
        share: [layers, neurons], running share of a neuron's activations that were selected.
        tau: [layers], the threshold; infinite before there is one.
        updates: [layers], how many updates tau and share have had.
        mean_var: [layers], mean of var over the whole layer, of all shards.
        std_at_start: [layers], the activations' standard deviation when inhibition started.
        mean_ms: [layers], the last batch's mean MS, in the units that tau is in; NaN before there
            was one.
        drift: [layers], what log tau moves by in each step beside its corrections.
        lm_gradient, ms_gradient, ratio_updates: [layers], of a `gradient_ratio`, running means of
            the root mean squares of the gradient that arrives and of L_MS's at weight 1, both of
            one sample's loss; and how many steps are in them.
        bad_age: [layers] int64, steps since the first with a NaN or Inf activation; -1: none was.
    """

    mean: Tensor
    mean_low: Tensor
    var: Tensor
    samples: Tensor
    share: Tensor
    tau: Tensor
    updates: Tensor
    mean_var: Tensor
    std_at_start: Tensor
    mean_ms: Tensor
    drift: Tensor
    lm_gradient: Tensor
    ms_gradient: Tensor
    ratio_updates: Tensor
    bad_age: Tensor

    @classmethod
    def empty(cls, neurons: int, device: torch.device) -> "Running":
        """Of one layer that was never called."""
        zeros = torch.zeros(1, neurons, dtype=torch.float32, device=device)
        zero = torch.zeros(1, dtype=torch.float32, device=device)
        return cls(
            mean=zeros,
            mean_low=zeros.clone(),
            var=zeros.clone(),
            samples=zero,
            share=zeros.clone(),
            tau=zero + float("inf"),
            updates=zero.clone(),
            mean_var=zero.clone(),
            std_at_start=zero + float("nan"),
            mean_ms=zero + float("nan"),
            drift=zero.clone(),
            lm_gradient=zero.clone(),
            ms_gradient=zero.clone(),
            ratio_updates=zero.clone(),
            bad_age=zero.long() - 1,
        )

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.mean, self.mean_low, self.var, self.samples)


class Derived(NamedTuple):
    """What a step's forward and backward passes use, derived from `Running`.

    Attributes:
        denominator: [layers, neurons], of the Monosemantic Scale.
        threshold: [layers, neurons], the (z - mean)^2 from which on an activation is selected.
        balance: [layers, neurons], running share of selected activations over variance
            (scale-invariant L_MS).
        weight: [layers], of L_MS.
    """

    denominator: Tensor
    threshold: Tensor
    balance: Tensor
    weight: Tensor

    @classmethod
    def of(cls, running: Running, config: L2EConfig) -> "Derived":
        var, mean_var, tau = running.var, running.mean_var[:, None], running.tau[:, None]
        # A layer of constants: nothing deviates, nothing is selected.
        denominator = (var + config.eps * mean_var).clamp(min=TINY)
        known = (config.gradient_ratio or 0.0) * running.lm_gradient / running.ms_gradient
        weight = DEFAULT_WEIGHT if config.weight is None else config.weight
        return cls(
            denominator=denominator,
            threshold=(tau * denominator).clamp(min=TINY),
            balance=torch.where(var > 0, running.share / var, 0),
            weight=torch.where(running.ratio_updates > 0, known, weight),
        )


class Metrics(NamedTuple):
    """What is only logged, [layers]: share and weight of the last step, the others of the last one
    that measured them; of the kurtosis all neurons', of all shards, [layers, total neurons]."""

    mean_ms: Tensor
    max_ms: Tensor
    kurtosis: Tensor
    mlp_to_residual: Tensor
    gradient_ratio: Tensor
    weight: Tensor
    selected_fraction: Tensor

    @classmethod
    def empty(cls, total_neurons: int, device: torch.device) -> "Metrics":
        """Of one layer that was never measured."""
        shapes = dict.fromkeys(cls._fields, (1,)) | {"kurtosis": (1, total_neurons)}
        nan = torch.tensor(float("nan"), dtype=torch.float32, device=device)
        return cls(*(nan.repeat(shape) for shape in shapes.values()))


class Sums:
    """What one step adds up: named views of one float32 buffer [..., sum of sizes]."""

    def __init__(self, sizes: dict[str, int], flat: Tensor) -> None:
        assert flat.shape[-1] == sum(sizes.values())
        self.sizes, self.flat = sizes, flat

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        return dict(
            zip(self.sizes, self.flat.split(list(self.sizes.values()), dim=-1), strict=True)
        )

    @classmethod
    def zeros(cls, layers: int, sizes: dict[str, int], device: torch.device) -> "Sums":
        flat = torch.zeros(layers, sum(sizes.values()), dtype=torch.float32, device=device)
        return cls(sizes, flat)

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    def row(self, number: int) -> "Sums":
        return Sums(self.sizes, self.flat[number])


class Flags(NamedTuple):
    """What is true of layers in this step, [layers] bool, as `LayerState` says."""

    selecting: Tensor
    observing: Tensor
    may_start: Tensor
    measuring: Tensor
    comparing: Tensor


class Stack:
    """All tensors of the layers of one width; its rows are the layers.

    Attributes:
        running, derived, metrics: as the last step left them.
        start: [layers], the tau that the last step gave which observed for one.
        sums: of this step so far: of z - mean, (z - mean)^2 and selected entries for each neuron;
            of log (z - mean)^2 over selected entries, of samples, and of squares of gradients
            (`LayerState.compare`).
        measured, counts: what measured steps add up besides; the MS's histogram as int64
            [layers, BINS].
        squares: for each layer [2], the sums of squares of MLP output and residual stream in
            measured steps: tensors of their own, since compiled graphs write to them.
    """

    def __init__(
        self, running: Running, metrics: Metrics, config: L2EConfig, data_size: int
    ) -> None:
        """With nothing summed up. `data_size`: data-parallel ranks, each with its own maximum."""
        self.running, self.metrics, self.config = running, metrics, config
        self.derived = Derived.of(running, config)
        self.start = torch.full_like(running.tau, float("inf"))
        layers, neurons = running.mean.shape
        sums = dict.fromkeys(("deviation", "square", "selected"), neurons)
        sums |= {"log_square": 1, "samples": 1, "gradient_squares": 3}
        self.sums = Sums.zeros(layers, sums, self.device)
        measured = {"fourth": neurons, "largest": data_size}
        self.measured = Sums.zeros(layers, measured, self.device)
        self.squares = [
            torch.zeros(2, dtype=torch.float32, device=self.device) for _ in range(layers)
        ]
        self.counts = torch.zeros(layers, BINS, dtype=torch.int64, device=self.device)
        self._flags: tuple[list[tuple[bool, ...]], Flags] | None = None

    @property
    def device(self) -> torch.device:
        return self.running.tau.device

    def __len__(self) -> int:
        return len(self.running.tau)

    @classmethod
    def joined(cls, rows: Sequence[tuple["Stack", int]], device: torch.device) -> "Stack":
        """One stack, on `device`, of these rows of others, with what they have summed up."""

        def column(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack([tensor.to(device) for tensor in tensors])

        running = zip(*([t[row] for t in stack.running] for stack, row in rows), strict=True)
        metrics = zip(*([t[row] for t in stack.metrics] for stack, row in rows), strict=True)
        first, _ = rows[0]
        joined = cls(
            Running(*map(column, running)),
            Metrics(*map(column, metrics)),
            first.config,
            first.measured.sizes["largest"],
        )
        joined.sums.flat.copy_(column(stack.sums.flat[row] for stack, row in rows))
        joined.measured.flat.copy_(column(stack.measured.flat[row] for stack, row in rows))
        joined.counts.copy_(column(stack.counts[row] for stack, row in rows))
        joined.squares = [stack.squares[row].to(device) for stack, row in rows]
        return joined

    def row_in(self, number: int, sharding: Sharding) -> "Stack":
        """A stack of one row alone, with a slot for its largest MS on each data-parallel rank."""
        running = Running(*(tensor[number : number + 1] for tensor in self.running))
        metrics = Metrics(*(tensor[number : number + 1] for tensor in self.metrics))
        alone = Stack(running, metrics, self.config, sharding.data_size)
        alone.sums.flat.copy_(self.sums.flat[number])
        alone.counts.copy_(self.counts[number])
        alone.squares = [self.squares[number]]
        for name, values in self.measured.row(number).parts.items():
            if name == "largest":
                alone.measured[name][:, sharding.data_rank] = values.max()
            else:
                alone.measured[name].copy_(values)
        return alone

    def clear(self) -> None:
        """Forget what was summed up; its `counts` stay what they are to whoever has them."""
        torch._foreach_zero_([self.sums.flat, self.measured.flat, *self.squares])
        self.counts = torch.zeros_like(self.counts)

    def flags(self, rows: list[tuple[bool, ...]]) -> Flags:
        """The rows' flags on the device, brought there when they change; nothing waits for it."""
        if self._flags is None or self._flags[0] != rows:
            values = torch.tensor(rows, device="cpu").to(self.device, non_blocking=True)
            self._flags = rows, Flags(*values.unbind(1))
        return self._flags[1]
