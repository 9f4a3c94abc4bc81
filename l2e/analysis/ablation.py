"""Ablation: how much the loss on each feature rises without one neuron (MEmeL Fig. 2).

An MLP is the last thing a block adds to the residual stream, so replacing a neuron's activation z
by z' adds (z' - z) times its output weights to the block's output, exactly. One ordinary pass keeps
the blocks' outputs; each neuron then costs only the blocks after its own, and the output embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from l2e.analysis.activations import length_batches, pad, tokenize, watch
from l2e.analysis.features import FeatureSet
from l2e.analysis.networks import Network, neuron_name

How = Literal["mean", "zero", "resample"]
SEED = 42
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class Settings:
    """how: what replaces the activation: its mean over the data set, 0, or its value at a random
    other token. max_tokens: where passages are cut. scored: how many random next-token predictions
    of a passage enter the loss (None: all). precision: bfloat16 runs the matrix products in it,
    about 3 times as fast, and leaves the residual stream in float32."""

    how: How = "mean"
    max_tokens: int = 128
    scored: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"


def analyze_ablation(
    network: Network,
    features: FeatureSet,
    neurons: list[tuple[int, int]],
    random_neurons: int,
    settings: Settings,
    progress: bool = True,
) -> dict:
    """The ablate verb's result: the rise of the loss per feature, in percent, for each neuron and
    for random neurons of the same layers.

    Raises ValueError for a neuron the model doesn't have.
    """
    for layer, neuron in neurons:
        if layer >= len(network.layers) or neuron >= network.neurons:
            raise ValueError(
                f"neuron {neuron_name(layer, neuron)}: {network.name} has {len(network.layers)} "
                f"layers of {network.neurons} neurons (counted from 0)"
            )
    random = np.random.default_rng(SEED)
    control = [
        (neurons[i % len(neurons)][0], int(random.integers(network.neurons)))
        for i in range(random_neurons)
    ]
    losses = ablation_losses(network, features, neurons + control, settings, progress)
    base, rest = losses[0], losses[1:]
    increase = 100 * (rest - base) / base

    def rows(names: list[tuple[int, int]], values: np.ndarray) -> list[dict]:
        return [
            {
                "neuron": neuron_name(*name),
                "increase_percent": dict(zip(features.names, row.tolist(), strict=True)),
            }
            for name, row in zip(names, values, strict=True)
        ]

    return {
        "how": settings.how,
        "precision": settings.precision,
        "loss": dict(zip(features.names, base.tolist(), strict=True)),
        "neurons": rows(neurons, increase[: len(neurons)]),
        "random": rows(control, increase[len(neurons) :]),
    }


def ablation_losses(
    network: Network,
    features: FeatureSet,
    neurons: list[tuple[int, int]],
    settings: Settings,
    progress: bool = True,
) -> np.ndarray:
    """Mean next-token loss (nats) of each feature: float64 [1 + neurons, features], the first row
    with nothing ablated."""
    tokens = tokenize(network, features.texts, settings.max_tokens)
    usable = [row for row, ids in enumerate(tokens) if len(ids) > 1]
    features = features.subset(np.array(usable))
    tokens = [tokens[row] for row in usable]
    lengths = np.array([len(ids) for ids in tokens])
    batches = length_batches(lengths, TOKENS_PER_BATCH)
    pools = _activations_of(network, tokens, batches, neurons, settings)

    totals = np.zeros((1 + len(neurons), len(features.names)))
    counts = np.zeros(len(features.names))
    bar = tqdm(total=len(batches) * (1 + len(neurons)), unit="passes", disable=not progress)
    with torch.no_grad(), _precision(network, settings), bar:
        for number, rows in enumerate(batches):
            ids, mask = pad([tokens[row] for row in rows], network.device)
            scored = _scored(mask, settings.scored, rows)
            labels = torch.from_numpy(features.labels[rows]).to(ids.device)
            label_of = labels[:, None].expand_as(scored)[scored]
            member = nn.functional.one_hot(label_of, len(features.names)).double()
            counts += member.sum(dim=0).cpu().numpy()

            run = _Pass(network, ids, mask, {layer for layer, _ in neurons})
            totals[0] += (run.losses(run.final, scored) @ member).cpu().numpy()
            bar.update()
            for index, (layer, neuron) in enumerate(neurons):
                hidden = run.without(
                    layer, neuron, pools[index].substitute(settings.how, ids, number)
                )
                totals[1 + index] += (run.losses(hidden, scored) @ member).cpu().numpy()
                bar.update()
    return totals / counts


class _Pass:
    """One batch's ordinary forward pass, kept so that it can be resumed after any block."""

    def __init__(self, network: Network, ids: torch.Tensor, mask: torch.Tensor, layers: set[int]):
        self.network, self.ids = network, ids
        self.calls: dict[int, tuple[tuple, dict]] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.hidden: dict[int, torch.Tensor] = {}
        self.gates: dict[int, torch.Tensor] = {}
        with self._recording(layers):
            model_output = network.model.base_model(
                input_ids=ids, attention_mask=mask.long(), use_cache=False
            )
        self.final = model_output.last_hidden_state

    @contextmanager
    def _recording(self, layers: set[int]) -> Iterator[None]:
        handles = []
        for number, layer in enumerate(self.network.layers):
            handles.append(
                layer.block.register_forward_pre_hook(
                    lambda _, args, kwargs, n=number: self.calls.update({n: (args, kwargs)}),
                    with_kwargs=True,
                )
            )
            if number in layers:
                handles.append(
                    layer.block.register_forward_hook(
                        lambda _, __, out, n=number: self.outputs.update({n: _hidden(out)})
                    )
                )
                handles.append(
                    layer.activation.register_forward_hook(
                        lambda _, __, out, n=number: self.hidden.update({n: out})
                    )
                )
                if layer.gate is not None:
                    handles.append(
                        layer.gate.register_forward_hook(
                            lambda _, __, out, n=number: self.gates.update({n: out})
                        )
                    )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def without(self, layer: int, neuron: int, value: torch.Tensor) -> torch.Tensor:
        """The final hidden states [batch, positions, hidden] with the neuron's z set to `value`,
        a scalar or [batch, positions]."""
        change = value - self.hidden[layer][..., neuron].float()
        if layer in self.gates:
            change = change * self.gates[layer][..., neuron].float()
        added = self.network.layers[layer].output_weight()[neuron].float()
        hidden = self.outputs[layer] + change.unsqueeze(-1) * added
        for number in range(layer + 1, len(self.network.layers)):
            args, kwargs = self.calls[number]
            hidden = _hidden(self.network.layers[number].block(hidden, *args[1:], **kwargs))
        return self.network.final_norm(hidden)

    def losses(self, hidden: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Next-token losses at the scored positions, float64 [scored]."""
        logits = self.network.unembed(hidden[:, :-1][scored])
        return nn.functional.cross_entropy(
            logits.float(), self.ids[:, 1:][scored], reduction="none"
        ).double()


@dataclass(frozen=True)
class _Pool:
    """A neuron's activations at all valid tokens, float32 [tokens]."""

    values: torch.Tensor

    def substitute(self, how: How, ids: torch.Tensor, batch: int) -> torch.Tensor:
        if how == "zero":
            return self.values.new_zeros(())
        if how == "mean":
            return self.values.mean()
        random = torch.Generator().manual_seed(SEED + batch)
        pick = torch.randint(len(self.values), ids.shape, generator=random)
        return self.values[pick.to(self.values.device)]


def _activations_of(network, tokens, batches, neurons, settings: Settings) -> list[_Pool]:
    """The activations of the given neurons over the whole data set."""
    if settings.how == "zero":
        return [_Pool(torch.zeros(1, device=network.device))] * len(neurons)
    wanted = {layer: [n for other, n in neurons if other == layer] for layer, _ in neurons}
    found: dict[tuple[int, int], list[torch.Tensor]] = {neuron: [] for neuron in neurons}
    with torch.no_grad(), _precision(network, settings):
        for rows in batches:
            ids, mask = pad([tokens[row] for row in rows], network.device)

            def see(layer: int, _, post: torch.Tensor, mask=mask) -> None:
                for neuron in set(wanted.get(layer, ())):
                    found[layer, neuron].append(post[..., neuron][mask].float())

            with watch(network, see):
                network.model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    return [_Pool(torch.cat(found[neuron])) for neuron in neurons]


def _scored(mask: torch.Tensor, count: int | None, rows: np.ndarray) -> torch.Tensor:
    """Which predictions enter the loss, bool [batch, positions - 1]: all of real next tokens, or
    `count` random ones of each passage."""
    real = mask[:, 1:]
    if count is None:
        return real
    drawn = np.stack([np.random.default_rng([SEED, row]).random(real.shape[1]) for row in rows])
    order = torch.from_numpy(drawn).to(mask.device).masked_fill(~real, 2.0)
    return real & (order.argsort(dim=1).argsort(dim=1) < count)


def _hidden(output) -> torch.Tensor:
    """A block's hidden states, whether it returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _precision(network: Network, settings: Settings):
    if settings.precision == "bfloat16":
        return torch.autocast(network.device.type, dtype=torch.bfloat16)
    return nullcontext()
