"""Once an optimizer step: merge what all layers observed, on all ranks, and move the thresholds.

One flat all-reduce over the data-parallel ranks and one small one over the tensor-parallel ranks;
nothing here waits for a GPU, except `metrics`, the checkpoint, and a step in which a layer may have
its first statistics or its start. Ranks first agree on layers whose size only activations tell.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l2e import merging, statistics, threshold
from l2e.config import L2EConfig
from l2e.layer import L2ELayer
from l2e.merging import Result, Shape, Sums
from l2e.sharding import Sharding
from l2e.stack import Stack
from l2e.state import LayerState, Phase
from l2e.statistics import Statistics

COLLAPSED = 0.1  # of the standard deviation at the first inhibited step
OF_MS_LOSS = ("weight", "gradient_ratio")
MEASURED = ("mean_ms", "max_ms", "kurtosis", "mlp_to_residual", "gradient_ratio")
METRICS = (*MEASURED, "weight", "tau", "selected_fraction", "std")
PATIENCE = 10  # steps that a layer may be without its start before a warning


class Controller:
    """Owns the state of all L2ELayers of this process.

    Set `gradient_scale` before a step's micro-batches (loss scale / number of micro-batches) and
    `measure` before a step whose metrics will be read; call `step()` once after each optimizer
    step, on every rank.

    Attributes:
        unobserved: the layers without samples in the first step, on any data-parallel rank; None
            before it.
    """

    def __init__(
        self, layers: Sequence[L2ELayer], config: L2EConfig, sharding: Sharding | None = None
    ) -> None:
        self.config = config
        self.sharding = sharding or Sharding()
        self.phase = Phase.of(config)
        self.states = [layer.state for layer in layers]
        self.unobserved: list[str] | None = None
        self._warned: set[str] = set()
        self._stepped: set[str] = set()
        self._histograms: dict[str, Tensor] = {}
        self._ms_loss = torch.zeros((), dtype=torch.float32)
        names = [state.name for state in self.states]
        if len(set(names)) != len(names):
            raise ValueError(f"l2e layers need distinct names, found {names}")
        for state in self.states:
            state.join(self.phase, self.sharding)

    def place(self, sharding: Sharding) -> None:
        """Work in these process groups from now on."""
        self.sharding = sharding
        for state in self.states:
            state.place(sharding)

    @property
    def gradient_scale(self) -> float:
        return self.phase.gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, value: float) -> None:
        self.phase.gradient_scale = value

    @property
    def measure(self) -> bool:
        return self.phase.measure

    @measure.setter
    def measure(self, value: bool) -> None:
        self.phase.measure = value

    @torch.no_grad()
    def step(self) -> None:
        """Merge the global batch into every layer's statistics; move tau and the shares."""
        self._agree_on_shapes()
        groups = self._stacked()
        self._agree_on_first_centres([s for states in groups for s in states if s.empty])
        squares = self._sum_over_data_ranks(groups)
        if self.unobserved is None:
            self.unobserved = [
                state.name
                for state in self.states
                if not state.positions or float(state.samples) == 0
            ]
        self._merge(groups, squares)
        self._warn_of_missing_starts()
        self.phase.step += 1

    def _stacked(self) -> list[list[LayerState]]:
        """The layers that have been called, by width; those of one width share a stack."""
        called = [state for state in self.states if state.positions]
        device = next((s.device for s in called if s.device.type != "cpu"), torch.device("cpu"))
        groups: dict[tuple[int, ...], list[LayerState]] = {}
        for state in called:
            kind = (state.units, state.positions, state.total_units, state.inhibited_layers)
            groups.setdefault(kind, []).append(state)
        for states in groups.values():
            stack = states[0].stack
            rows = [(state.stack, state.row) for state in states]
            if stack.device != device or rows != [(stack, row) for row in range(len(stack))]:
                stack = Stack.joined(rows, device)
                for row, state in enumerate(states):
                    state.be(stack, row)
        return list(groups.values())

    def _warn_of_missing_starts(self) -> None:
        for state in self.states:
            state.waited += state.starting
        late = [state.name for state in self.states if state.waited == PATIENCE and state.starting]
        if late:
            warnings.warn(
                f"l2e: nothing is selected in layers {', '.join(late)}, {PATIENCE} steps after "
                f"their late start (late_start_step = {self.config.late_start_step}): in none of "
                "these steps were they called in training mode with finite activations that vary, "
                "and earlier statistics. Each will begin after its first step that can be used",
                stacklevel=3,
            )

    def _agree_on_shapes(self) -> None:
        """Let every rank have the layers that any rank has called, and know who did so first.

        Raises:
            ValueError: ranks found different numbers of neurons in a layer.
        """
        new = [state for state in self.states if state.empty and state.shape_from_data]
        if not new or self.sharding.data_size == 1:
            return
        tables = self.sharding.gather_data([[s.positions, s.units, int(s.started)] for s in new])
        for state, *found in zip(new, *tables, strict=True):
            shapes = {(positions, units) for positions, units, _ in found if positions}
            if len(shapes) > 1:
                raise ValueError(
                    f"l2e layer {state.name}: data-parallel ranks found different numbers of "
                    f"(positions, units): {sorted(shapes)}; give all ranks inputs of one width"
                )
            if shapes and not state.positions:
                [(positions, units)] = shapes
                state.allocate(units, positions, torch.device("cpu"))
            state.centre_rank = next((rank for rank, row in enumerate(found) if row[2]), 0)

    def _agree_on_first_centres(self, states: list[LayerState]) -> None:
        """Move first batches' sums on all data ranks to the centre of one rank that has samples."""
        if self.sharding.data_size > 1:
            for rank in sorted({state.centre_rank for state in states}):
                self._move_to_centre([s for s in states if s.centre_rank == rank], rank)

    def _move_to_centre(self, states: list[LayerState], rank: int) -> None:
        own = torch.cat([state.mean for state in states])
        common = self.sharding.from_data_rank(rank, own)
        sizes = [state.neurons for state in states]
        moves = (own - common).split(sizes)
        for state, centre, move in zip(states, common.split(sizes), moves, strict=True):
            sums = state.sums
            deviation, square = statistics.recentre(
                sums["samples"], sums["deviation"], sums["square"], move
            )
            sums["deviation"].copy_(deviation)
            sums["square"].copy_(square)
            state.mean.copy_(centre)

    def _sum_over_data_ranks(self, groups: list[list[LayerState]]) -> list[Tensor | None]:
        """Replace every layer's sums by those of the global batch, in one all-reduce.

        Returns each group's sums of squares of MLP output and residual stream, [layers, 2]; None
        for one that measures nothing.
        """
        squares, buffers = [], [states[0].stack.sums.flat for states in groups]
        for states in groups:
            stack, own = states[0].stack, None
            if any(state.measuring for state in states):
                own = torch.stack(stack.squares)
                buffers += [stack.measured.flat, own, stack.counts]
            squares.append(own)
        self.sharding.sum_data(buffers)
        return squares

    def _merge(self, groups: list[list[LayerState]], squares: list[Tensor | None]) -> None:
        """Give every layer the state of the next step, and forget the sums of this one."""
        shapes = [self._shape(states[0]) for states in groups]
        merged, buffers = [], []
        for states, own, shape in zip(groups, squares, shapes, strict=True):
            stack = states[0].stack
            measured = None if own is None else stack.measured.parts
            arguments = stack.running, stack.derived.denominator, stack.sums.parts, measured
            new, totals = self._run(merging.merge, stack, *arguments, self.config, shape)
            merged.append((new, totals))
            buffers += [*totals.values(), *([] if own is None else [stack.counts])]
        self.sharding.sum_tensor(buffers)
        losses = [
            self._advance(states, *new, own, shape)
            for states, new, own, shape in zip(groups, merged, squares, shapes, strict=True)
        ]
        if losses:
            self._ms_loss = sum(losses[1:], start=losses[0])

    def _advance(
        self,
        states: list[LayerState],
        new: Statistics,
        totals: Sums,
        squares: Tensor | None,
        shape: Shape,
    ) -> Tensor:
        """Let layers of one width have their next state; returns their L_MS []."""
        stack = states[0].stack
        if any(state.observing for state in states):
            stack.start = threshold.quantile(stack.counts, self.config.inhibit_fraction)
        old = stack.running, stack.metrics, stack.derived.weight, stack.start
        flags = stack.flags([state.flags for state in states])
        arguments = new, stack.sums.parts, totals, squares, flags, self.config, shape
        after = self._run(merging.advance, stack, *old, *arguments)
        stack.running, stack.derived, stack.metrics = after.running, after.derived, after.metrics
        self._histograms |= {s.name: s.counts for s in states if s.measuring}
        self._stepped |= {state.name for state in states}
        if any(state.empty or state.starting for state in states):
            learned = torch.stack([after.usable, after.starts], 1).tolist()
            for state, (usable, starts) in zip(states, learned, strict=True):
                state.note(usable, starts)
        stack.clear()
        return after.ms_loss

    def _run(self, function: Callable[..., Result], stack: Stack, *arguments: Any) -> Result:
        return merging.run(stack.device, self.config, function, *arguments)

    def _shape(self, state: LayerState) -> Shape:
        return Shape(
            state.total_neurons,
            state.inhibited_layers * state.expected_selected(1),
            self.sharding.tensor_size,
            self.sharding.tensor_rank,
        )

    def ms_loss(self) -> Tensor:
        """L_MS of the last step: a detached float32 scalar.

        It is the mean over the whole global batch, summed over this process's layers (all shards
        of them); 0 unless the method is "regularize".
        """
        return self._ms_loss

    def metrics(self) -> dict[str, dict[str, float]]:
        """Each layer's numbers after the last step, the same on all data and tensor ranks.

        `mean_ms`, `max_ms`, `kurtosis` (the median neuron's) and `mlp_to_residual` (RMS of the
        MLP's output over the residual stream's) are of the last measured step, NaN before it;
        `std` is the running activation standard deviation. With "regularize" also `weight`, of
        L_MS in that step, and `gradient_ratio`, the root mean square of L_MS's gradient to the
        activations over that of the gradient that arrived there, of the last step that measured
        it (with `gradient_ratio` set, every step that selects). Waits for the device.

        Raises:
            ValueError: an activation was NaN or Inf; names layers and steps, once.
        """
        if bad := self.bad_steps():
            found = "; ".join(
                f"layer {name}: NaN or Inf among the activations of step {step}"
                for name, step in bad.items()
            )
            raise ValueError(
                f"l2e {found}; its statistics were left as before that step. Lower the learning "
                "rate or the loss scale, resume from an earlier checkpoint, or leave such a batch "
                "out: with l2e.attach, by handle.discard() before handle.step()"
            )
        metrics = {}
        for state in self._stepped_states():
            tau, std = state.running.tau, state.running.mean_var.sqrt()
            known = state.metrics._asdict() | {"tau": tau, "std": std}
            known["kurtosis"] = known["kurtosis"].nanmedian()
            if self.config.weight is not None:
                known["weight"] = self.config.weight
            metrics[state.name] = {name: float(known[name]) for name in self.nothing()}
            self._warn_of_collapse(state, metrics[state.name]["std"])
            self._warn_of_unknown_ratio(state)
        return metrics

    def nothing(self) -> dict[str, float]:
        """The metrics of a layer before anything was observed: NaN."""
        left_out = () if self.config.method == "regularize" else OF_MS_LOSS
        return {name: float("nan") for name in METRICS if name not in left_out}

    def _stepped_states(self) -> list[LayerState]:
        return [state for state in self.states if state.name in self._stepped]

    def bad_steps(self) -> dict[str, int]:
        """{layer: its last step, from 0, with NaN or Inf among the activations}, each told once.

        Its statistics are as before that step. Waits for the device.
        """
        found = {}
        for state in self._stepped_states():
            if (age := int(state.running.bad_age)) >= 0:
                state.running.bad_age.fill_(-1)
                found[state.name] = self.phase.step - 1 - age
        return found

    def discard(self) -> None:
        """Forget what was observed since the last step."""
        for state in self.states:
            if state.positions:
                state.reset_sums()
                state.started = not state.empty

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is evaluated inside is inhibited, and adds nothing to what was observed."""
        before = [state.summed() for state in self.states]
        yield
        for state, sums in zip(self.states, before, strict=True):
            state.restore(sums)

    def _warn_of_collapse(self, state: LayerState, std: float) -> None:
        start = float(state.running.std_at_start)
        if std < COLLAPSED * start and state.name not in self._warned:
            self._warned.add(state.name)
            warnings.warn(
                f"l2e layer {state.name}: the activations' standard deviation fell to {std:.3g}, "
                f"below {COLLAPSED:.0%} of the {start:.3g} when inhibition started. L_MS is being "
                "lowered by shrinking the layer, not by its shape: set scale_invariant = true or "
                f"a lower {self.config.strength}, and compare with method = 'silence'",
                stacklevel=3,
            )

    def _warn_of_unknown_ratio(self, state: LayerState) -> None:
        """Once, of a layer whose weight stays what it was before there was an estimate."""
        running, told = state.running, f"{state.name}.gradient_ratio"
        unknown = self.config.gradient_ratio is not None and float(running.ratio_updates) == 0
        if unknown and float(running.updates) >= PATIENCE and told not in self._warned:
            self._warned.add(told)
            warnings.warn(
                f"l2e layer {state.name}: gradient_ratio = {self.config.gradient_ratio} could not "
                f"set the weight in {PATIENCE} steps that selected, it is {float(state.weight):g}: "
                "of the gradient that arrives there and L_MS's, one was 0 or not finite. Does the "
                "loss depend on this layer, and does its backward pass run before step()?",
                stacklevel=3,
            )

    def histograms(self) -> dict[str, Tensor]:
        """Counts (int64, on the CPU) of the MS in the last measured step, one tensor a layer.

        Their bins are `l2e.threshold.bin_edges()`.
        """
        return {name: counts.cpu() for name, counts in self._histograms.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """This process's layers as full tensors, {layer.mean, layer.var, layer.tau, ...: ...}.

        Every tensor-parallel rank must call it. `step` counts the merged steps.
        """
        tensors = {"step": torch.tensor(self.phase.step, device="cpu")}
        for state in self.states:
            if not state.positions:  # never called
                tensors[f"{state.name}.samples"] = torch.zeros(
                    (), dtype=torch.float32, device="cpu"
                )
                continue
            for name, value in state.saved().items():
                full = self.sharding.gather_neurons(value) if value.dim() else value
                tensors[f"{state.name}.{name}"] = full.detach().to("cpu", copy=True)
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state saved under any layout; other processes' layers are passed over.

        Raises:
            ValueError: a tensor of this process's layers is missing or of another size.
        """
        if "step" not in tensors:
            raise ValueError("l2e state: no entry 'step'; this is not a state this package saved")
        self.phase.step = int(tensors["step"])
        for state in self.states:
            state.load(
                {
                    name.removeprefix(f"{state.name}."): value
                    for name, value in tensors.items()
                    if name.startswith(f"{state.name}.")
                }
            )
