"""Once an optimizer step: merge what all layers observed, on all ranks, and move the thresholds.

One flat all-reduce over the data-parallel ranks and one small one over the tensor-parallel ranks;
nothing here waits for a GPU, except `metrics`, the checkpoint, and a step in which a layer may have
its first statistics or its start. Ranks first agree on layers whose size only activations tell.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from l2e import statistics, threshold
from l2e.config import L2EConfig
from l2e.layer import L2ELayer
from l2e.sharding import Sharding
from l2e.state import LayerState, Phase, Sums
from l2e.statistics import Statistics

COLLAPSED = 0.1  # of the standard deviation at the first inhibited step
OF_MS_LOSS = ("weight", "gradient_ratio")
MEASURED = ("mean_ms", "max_ms", "kurtosis", "mlp_to_residual", "gradient_ratio")
FIGURES = (*MEASURED, "weight", "tau", "selected_fraction", "std")
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
        self._metrics: dict[str, dict[str, Tensor | float]] = {}
        self._histograms: dict[str, Tensor] = {}
        self._ms_loss = torch.zeros(())
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
        states = [state for state in self.states if state.positions]
        if states:
            device = next((s.device for s in states if s.device.type != "cpu"), states[0].device)
            for state in states:
                state.to(device)
            self._agree_on_first_centres([state for state in states if state.empty])
            self._sum_over_data_ranks(states)
        if self.unobserved is None:
            self.unobserved = [
                state.name
                for state in self.states
                if not state.positions or float(state.sums["samples"]) == 0
            ]
        if states:
            merged = [_merge(state) for state in states]
            totals = self._sum_over_tensor_ranks(states, merged)
            self._ms_loss = self._loss(states, totals)
            usable = [
                self._accept(state, new, total)
                for state, new, total in zip(states, merged, totals, strict=True)
            ]
            if any(state.empty or state.starting for state in states):
                for state, used in zip(states, torch.stack(usable).tolist(), strict=True):
                    state.note(used)
        for state in states:
            state.reset_sums()
        self._warn_of_missing_starts()
        self.phase.step += 1

    def _warn_of_missing_starts(self) -> None:
        for state in self.states:
            state.waited += state.starting
        late = [state.name for state in self.states if state.waited == PATIENCE and state.starting]
        if late:
            warnings.warn(
                f"l2e: nothing is selected in layers {', '.join(late)}, {PATIENCE} steps after "
                f"their late start (late_start_step = {self.config.late_start_step}): in none of "
                "these steps were they called in training mode with finite activations and earlier "
                "statistics. Each will begin after its first step that can be used",
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
        own = torch.cat([state.statistics.mean for state in states])
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
            state.statistics.mean.copy_(centre)

    def _sum_over_data_ranks(self, states: list[LayerState]) -> None:
        """Replace every layer's sums by those of the global batch, in one all-reduce."""
        buffers = [state.sums for state in states]
        for state in states:
            if state.measuring:
                state.measured["histogram"].copy_(threshold.to_words(state.counts))
                buffers.append(state.measured)
        flat = self.sharding.sum_data(torch.cat([buffer.flat for buffer in buffers]))
        for buffer, part in zip(
            buffers, flat.split([len(buffer.flat) for buffer in buffers]), strict=True
        ):
            buffer.flat.copy_(part)

    def _sum_over_tensor_ranks(
        self, states: list[LayerState], merged: list[Statistics]
    ) -> list[Sums]:
        """What only sums over a layer's shards tell, in one all-reduce."""
        totals = [
            _totals(state, new, state.measuring, self.sharding)
            for state, new in zip(states, merged, strict=True)
        ]
        flat = self.sharding.sum_tensor(torch.cat([total.flat for total in totals]))
        parts = flat.split([len(total.flat) for total in totals])
        return [Sums(total.sizes, part) for total, part in zip(totals, parts, strict=True)]

    def _accept(self, state: LayerState, new: Statistics, total: Sums) -> Tensor:
        """Take over the merged statistics, unless an activation was NaN or Inf.

        Returns whether there were samples, all of them finite ([], bool).
        """
        samples = state.sums["samples"][0]
        finite = torch.isfinite(total["var"][0])
        seen = finite & (samples > 0)
        old_mean_var = state.mean_var
        mean_var = torch.where(finite, total["var"][0] / state.total_neurons, old_mean_var)
        state.bad_step = torch.where(
            finite | (state.bad_step >= 0), state.bad_step, self.phase.step
        )
        first_centre_only = state.statistics.samples == 0
        old = state.statistics
        kept_mean = torch.where(first_centre_only, torch.zeros_like(old.mean), old.mean)
        old = Statistics(kept_mean, old.mean_low, old.var, old.samples)
        state.statistics = statistics.where(finite, new, old)

        entries = samples.clamp(min=1) * state.total_neurons
        share, mean_ms = total["selected"][0] / entries, total["scale"][0] / entries
        if state.selecting:
            self._follow(state, share, mean_ms, seen)
        if state.measuring:
            counts = threshold.from_words(total["histogram"])
            self._histograms[state.name] = counts
            if state.observing:
                start = threshold.quantile(counts, self.config.inhibit_fraction)
                state.tau = torch.where(seen, start, state.tau)
        state.mean_ms = torch.where(seen, mean_ms, state.mean_ms)
        for name in ("tau", "mean_ms"):  # into the units of the merged variance
            carried = threshold.carry(getattr(state, name), old_mean_var, mean_var)
            setattr(state, name, carried)
        if state.may_start:
            state.std_at_start = torch.where(seen, mean_var.sqrt(), state.std_at_start)
        if self.config.method == "regularize":
            self._metrics.setdefault(state.name, {})["weight"] = state.weight
        if state.comparing:
            self._compare_gradients(state, total["gradient_squares"], entries, seen)
        state.refresh(mean_var)
        self._keep_metrics(state, share, mean_ms, total)
        return seen

    def _follow(self, state: LayerState, share: Tensor, mean_ms: Tensor, seen: Tensor) -> None:
        """Move tau and the neurons' running shares by one selecting step."""
        config = self.config
        if config.selection != "topk":
            eta = threshold.step_size(
                state.updates, config.threshold_rate, config.threshold_rate_floor
            )
            tau, drift = threshold.update(
                state.tau, state.drift, share, config.inhibit_fraction, eta
            )
            tau = threshold.follow(tau, state.mean_ms, mean_ms)
            state.tau = torch.where(seen, tau, state.tau)
            state.drift = torch.where(seen, drift, state.drift)
        own = state.sums["selected"] / state.sums["samples"].clamp(min=1)
        weight = threshold.share_weight(state.updates, config.forget_step)
        state.share = torch.where(seen, torch.lerp(state.share, own, weight), state.share)
        state.updates = state.updates + seen

    def _compare_gradients(
        self, state: LayerState, squares: Tensor, entries: Tensor, seen: Tensor
    ) -> None:
        """How large L_MS's gradient was beside the one that arrived; its running means."""
        arrived, added, direction = (squares / entries).sqrt()
        ratio = added / arrived
        self._metrics[state.name]["gradient_ratio"] = ratio
        if self.config.gradient_ratio is None:
            return
        # Whatever scaled the losses, and averages over micro-batches and ranks, scaled both.
        ms_gradient = direction / (state.inhibited_layers * state.expected_selected(1))
        lm_gradient = state.weight * ms_gradient / ratio
        usable = seen & (lm_gradient > 0) & torch.isfinite(lm_gradient) & torch.isfinite(arrived)
        newest = threshold.share_weight(state.ratio_updates, self.config.forget_step)
        for name, value in (("lm_gradient", lm_gradient), ("ms_gradient", ms_gradient)):
            mean = getattr(state, name)
            setattr(state, name, torch.where(usable, torch.lerp(mean, value, newest), mean))
        state.ratio_updates = state.ratio_updates + usable

    def _keep_metrics(self, state: LayerState, share: Tensor, mean_ms: Tensor, total: Sums) -> None:
        kept = self._metrics.setdefault(state.name, {})
        kept |= {"tau": state.tau, "selected_fraction": share, "std": state.mean_var.sqrt()}
        if state.measuring:
            kept |= {
                "mean_ms": mean_ms,
                "max_ms": total["largest"].max(),
                "kurtosis": statistics.median(total["kurtosis"]),
                "mlp_to_residual": (total["output_square"] / total["residual_square"]).sqrt()[0],
            }

    def _loss(self, states: list[LayerState], totals: list[Sums]) -> Tensor:
        loss = torch.zeros((), device=states[0].device)
        if self.config.method == "regularize":
            for state, total in zip(states, totals, strict=True):
                samples = state.sums["samples"][0].clamp(min=1)
                loss += state.loss_factor(1) * total["log_square"][0] / samples
        return loss

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
        metrics = {}
        observed = [state for state in self.states if state.name in self._metrics]
        self._raise_of_bad_steps(observed)
        for state in observed:
            kept = self._metrics[state.name]
            metrics[state.name] = self.nothing() | {
                name: float(value) for name, value in kept.items()
            }
            self._warn_of_collapse(state, metrics[state.name]["std"])
            self._warn_of_unknown_ratio(state)
        return metrics

    def nothing(self) -> dict[str, float]:
        """The figures of a layer before anything was observed: NaN."""
        left_out = () if self.config.method == "regularize" else OF_MS_LOSS
        return {name: float("nan") for name in FIGURES if name not in left_out}

    def _raise_of_bad_steps(self, states: list[LayerState]) -> None:
        bad = {state: step for state in states if (step := int(state.bad_step)) >= 0}
        if not bad:
            return
        for state in bad:
            state.bad_step = torch.full_like(state.bad_step, -1)
        found = "; ".join(
            f"layer {state.name}: NaN or Inf among the activations of step {step}"
            for state, step in bad.items()
        )
        raise ValueError(
            f"l2e {found}; its statistics were left as before that step. Lower the learning rate "
            "or the loss scale, resume from an earlier checkpoint, or leave such a batch out: with "
            "l2e.attach, by handle.discard() before handle.step()"
        )

    def discard(self) -> None:
        """Forget what was observed since the last step."""
        for state in self.states:
            if state.positions:
                state.reset_sums()
                state.started = not state.empty

    def _warn_of_collapse(self, state: LayerState, std: float) -> None:
        start = float(state.std_at_start)
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
        unknown = self.config.gradient_ratio is not None and float(state.ratio_updates) == 0
        told = f"{state.name}.gradient_ratio"
        if unknown and float(state.updates) >= PATIENCE and told not in self._warned:
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
        tensors = {"step": torch.tensor(self.phase.step)}
        for state in self.states:
            if not state.positions:  # never called
                tensors[f"{state.name}.samples"] = torch.zeros(())
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


def _merge(state: LayerState) -> Statistics:
    sums = state.sums
    return statistics.merge(
        state.statistics,
        sums["samples"][0],
        sums["deviation"],
        sums["square"],
        state.config.forget_step,
        first_twice=state.config.memel_code_compat,
    )


def _totals(state: LayerState, new: Statistics, measuring: bool, sharding: Sharding) -> Sums:
    """This shard's part of what is summed over a layer's shards.

    A NaN or Inf anywhere makes the sum of variances one too, so every shard learns of it.
    """
    sums, measured = state.sums, state.measured
    parts = {
        "var": new.var.sum().view(1),
        "selected": sums["selected"].sum().view(1),
        "log_square": sums["log_square"],
        "scale": (sums["square"] / state.denominator).sum().view(1),
        "gradient_squares": sums["gradient_squares"],
    }
    if measuring:
        kurtosis = sums["samples"] * measured["fourth"] / sums["square"].square()
        parts |= {
            "histogram": measured["histogram"],
            "largest": _in_own_slot(measured["largest"].max().view(1), sharding),
            "kurtosis": _in_own_slot(kurtosis, sharding),
            "output_square": measured["output_square"],
            "residual_square": measured["residual_square"],
        }
    sizes = {name: len(part) for name, part in parts.items()}
    return Sums(sizes, torch.cat(list(parts.values())))


def _in_own_slot(values: Tensor, sharding: Sharding) -> Tensor:
    """[n] -> [tensor ranks * n], zero but for this rank's: its sum over ranks is a gathering."""
    slots = values.new_zeros(sharding.tensor_size, len(values))
    slots[sharding.tensor_rank] = values
    return slots.flatten()
