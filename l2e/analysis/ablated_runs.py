"""Passages run with single neurons ablated, exactly or to first order.

Exactly: an MLP is the last thing a block adds to the residual stream, so replacing a neuron's
activation z by z' adds (z' - z) times its output weights to the block's output. One ordinary pass
keeps the blocks' outputs; each neuron then costs the blocks after its own and the output embedding.

To first order: one backward pass tells dL/dz of all neurons, and so dL/dz (z' - z).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from l2e.analysis.activations import length_batches, pad, tokenize, watch
from l2e.analysis.features import FeatureSet
from l2e.analysis.networks import Network
from l2e.progress import Progress

if TYPE_CHECKING:
    from l2e.analysis.ablation import AblationOptions

SEED = 42
TOKENS_PER_BATCH = 4096
# Rows of logits at a time: they stay in a processor's cache, and its memory is used again.
LOGIT_ROWS = {"cpu": 128, "cuda": 4096}


class Passages:
    """A feature set's passages of at least two tokens, and their batches of like length.

    max_tokens: where they are cut. scored: how many random next-token predictions of each enter its
    loss (None: all). counts: predictions that enter each one's loss, [passages]; member: 0 or 1,
    [features, passages].
    """

    def __init__(self, network: Network, features: FeatureSet, max_tokens: int, scored: int | None):
        tokens = tokenize(network, features.texts, max_tokens)
        usable = np.array([row for row, ids in enumerate(tokens) if len(ids) > 1])
        self.features = features.subset(usable)
        self.tokens = [tokens[row] for row in usable]
        self.lengths = np.array([len(ids) for ids in self.tokens])
        self.counts = np.minimum(self.lengths - 1, scored or self.lengths)
        self.scored_each = scored
        self.member = (self.features.labels == np.arange(len(features.names))[:, None]).astype(
            float
        )
        self.device = network.device

    def __len__(self) -> int:
        return len(self.tokens)

    def sample(self, per_feature: int | None) -> np.ndarray:
        """Random rows of each feature, so many or all, ascending."""
        return self.features.drawn(per_feature, SEED)

    def batches(self, rows: np.ndarray, tokens_per_batch: int) -> Iterator[PassageBatch]:
        for places in length_batches(self.lengths[rows], tokens_per_batch):
            chosen = rows[places]
            ids, mask = pad([self.tokens[row] for row in chosen], self.device)
            drawn = np.stack(
                [np.random.default_rng([SEED, row]).random((ids.shape[1], 2)) for row in chosen]
            )
            first, second = torch.from_numpy(drawn).to(ids.device).unbind(dim=2)
            scored = _scored(mask, self.scored_each, first[:, 1:])
            yield PassageBatch(places, chosen, ids, mask, scored, second)


@dataclass(frozen=True)
class PassageBatch:
    """Some passages: `places` among those asked for, their `rows`, tokens [batch, positions], where
    these are real, which predictions are scored [batch, positions - 1], and uniform random numbers
    [batch, positions] that are a passage's own, whatever batch it is in."""

    places: np.ndarray
    rows: np.ndarray
    ids: torch.Tensor
    mask: torch.Tensor
    scored: torch.Tensor
    uniform: torch.Tensor

    def predictions(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states [scored, hidden] of what is scored, and the tokens that follow."""
        return hidden[:, :-1][self.scored], self.ids[:, 1:][self.scored]

    def by_passage(self, losses: torch.Tensor) -> np.ndarray:
        """Sums over each passage's scored predictions, float64 [batch]; losses: [scored]."""
        passage = torch.nonzero(self.scored)[:, 0]
        sums = torch.zeros(len(self.rows), dtype=torch.float64, device=losses.device)
        return sums.index_add_(0, passage, losses.double()).cpu().numpy()


def ablate(
    network: Network,
    data: Passages,
    rows: np.ndarray,
    neurons: list[tuple[int, int]],
    pools: list[Pool],
    options: AblationOptions,
    progress: bool,
) -> np.ndarray:
    """Losses of the passages `rows`, float64 [1 + neurons, rows]: as they are, then ablated."""
    losses = np.zeros((1 + len(neurons), len(rows)))
    bar = Progress(
        total=len(rows) * (1 + len(neurons)),
        desc="ablating",
        unit="passages",
        unit_scale=True,
        progress=progress,
    )
    with torch.no_grad(), _precision(network, options), bar:
        for batch in data.batches(rows, TOKENS_PER_BATCH):
            run = _Pass(network, batch, {layer for layer, _ in neurons})
            losses[0, batch.places] = batch.by_passage(run.losses(run.final))
            bar.update(len(batch.rows))
            for index, (layer, neuron) in enumerate(neurons):
                value = pools[index].substitute(options.how, batch)
                hidden = run.without(layer, neuron, value)
                losses[1 + index, batch.places] = batch.by_passage(run.losses(hidden))
                bar.update(len(batch.rows))
    return losses


def first_order(
    network: Network,
    data: Passages,
    neurons: list[tuple[int, int]],
    pools: list[Pool],
    options: AblationOptions,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of all passages [passages], and their rise without each neuron [neurons, passages] as
    far as the gradient tells it: the sum over tokens of dL/dz (z' - z)."""
    base, rise = np.zeros(len(data)), np.zeros((len(neurons), len(data)))
    layers = sorted({layer for layer, _ in neurons})
    everything = np.arange(len(data))
    bar = Progress(total=len(data), desc="gradients", unit="passages", progress=progress)
    with _precision(network, options), bar:
        for batch in data.batches(everything, TOKENS_PER_BATCH):
            z: dict[int, torch.Tensor] = {}
            with watch(network, lambda layer, _, post, z=z: z.update({layer: post})):
                hidden = network.hidden(batch.ids, batch.mask)
            states, labels = batch.predictions(hidden)
            losses, slopes = _losses_with_slopes(network, states.detach(), labels)
            gradients = torch.autograd.grad(states, [z[layer] for layer in layers], slopes)
            slope = dict(zip(layers, gradients, strict=True))
            base[batch.rows] = batch.by_passage(losses)
            for index, (layer, neuron) in enumerate(neurons):
                change = pools[index].substitute(options.how, batch) - z[layer][..., neuron]
                product = (slope[layer][..., neuron] * change).detach() * batch.mask
                rise[index, batch.rows] = product.double().sum(dim=1).cpu().numpy()
            bar.update(len(batch.rows))
    return base, rise


def _chunks(
    states: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = LOGIT_ROWS[states.device.type]
    return zip(states.split(rows), labels.split(rows), strict=True)


def _losses(network: Network, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token losses, float32 [scored], from final hidden states [scored, hidden]."""
    parts = [
        nn.functional.cross_entropy(network.unembed(some).float(), wanted, reduction="none")
        for some, wanted in _chunks(states, labels)
    ]
    return torch.cat(parts)


def _losses_with_slopes(
    network: Network, states: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, and each one's gradient to its own hidden states [scored, hidden]."""
    losses: list[torch.Tensor] = []
    slopes: list[torch.Tensor] = []
    for some, wanted in _chunks(states, labels):
        leaf = some.detach().requires_grad_()
        part = _losses(network, leaf, wanted)
        losses.append(part.detach())
        slopes += torch.autograd.grad(part.sum(), leaf)
    return torch.cat(losses), torch.cat(slopes)


class _Pass:
    """One batch's ordinary forward pass, kept so that it can be resumed after any block."""

    def __init__(self, network: Network, batch: PassageBatch, layers: set[int]):
        self.network, self.batch = network, batch
        self.calls: dict[int, tuple[tuple, dict]] = {}
        self.outputs: dict[int, Any] = {}
        self.hidden: dict[int, torch.Tensor] = {}
        self.gates: dict[int, torch.Tensor] = {}
        with ExitStack() as hooks:
            for number, layer in enumerate(network.layers):
                hooks.enter_context(
                    layer.block.register_forward_pre_hook(
                        lambda _, args, kwargs, n=number: self.calls.update({n: (args, kwargs)}),
                        with_kwargs=True,
                    )
                )
                kept = {layer.block: self.outputs, layer.activation: self.hidden}
                if layer.gate is not None:
                    kept[layer.gate] = self.gates
                for module, found in kept.items() if number in layers else ():
                    hooks.enter_context(
                        module.register_forward_hook(
                            lambda _, __, out, n=number, found=found: found.update({n: out})
                        )
                    )
            self.final = network.hidden(batch.ids, batch.mask)

    def without(self, layer: int, neuron: int, value: torch.Tensor) -> torch.Tensor:
        """The final hidden states [batch, positions, hidden] with the neuron's z set to `value`,
        a scalar or [batch, positions]."""
        change = value - self.hidden[layer][..., neuron].float()
        if layer in self.gates:
            change = change * self.gates[layer][..., neuron].float()
        added = self.network.layers[layer].output_weight()[neuron].float()
        hidden = _hidden(self.outputs[layer]) + change.unsqueeze(-1) * added
        for number in range(layer + 1, len(self.network.layers)):
            args, kwargs = self.calls[number]
            hidden = _hidden(self.network.layers[number].block(hidden, *args[1:], **kwargs))
        return self.network.final_norm(hidden)

    def losses(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token losses at the scored positions, float32 [scored]."""
        return _losses(self.network, *self.batch.predictions(hidden))


@dataclass(frozen=True)
class Pool:
    """A neuron's activations at all valid tokens, float32 [tokens]."""

    values: torch.Tensor

    def substitute(self, how: str, batch: PassageBatch) -> torch.Tensor:
        """What the neuron's activation is replaced by: a scalar, or [batch, positions]."""
        if how == "zero":
            return self.values.new_zeros(())
        if how == "mean":
            return self.values.mean()
        return self.values[(batch.uniform * len(self.values)).long()]


def activations_of(
    network: Network, data: Passages, neurons: list[tuple[int, int]], options: AblationOptions
) -> list[Pool]:
    """The activations of the given neurons over the whole data set."""
    if options.how == "zero":
        return [Pool(torch.zeros(1, device=network.device))] * len(neurons)
    wanted = {layer: [n for other, n in neurons if other == layer] for layer, _ in neurons}
    found: dict[tuple[int, int], list[torch.Tensor]] = {neuron: [] for neuron in neurons}
    with torch.no_grad(), _precision(network, options):
        for batch in data.batches(np.arange(len(data)), TOKENS_PER_BATCH):

            def hook(layer: int, _, post: torch.Tensor, mask=batch.mask) -> None:
                for neuron in set(wanted.get(layer, ())):
                    found[layer, neuron].append(post[..., neuron][mask].float())

            with watch(network, hook):
                network.hidden(batch.ids, batch.mask)
    return [Pool(torch.cat(found[neuron])) for neuron in neurons]


def _scored(mask: torch.Tensor, count: int | None, uniform: torch.Tensor) -> torch.Tensor:
    """Which predictions enter the loss, bool [batch, positions - 1]: all of real next tokens, or
    `count` random ones of each passage, those with the smallest of the numbers `uniform`."""
    real = mask[:, 1:]
    if count is None:
        return real
    order = uniform.masked_fill(~real, 2.0)
    return real & (order.argsort(dim=1).argsort(dim=1) < count)


def _hidden(output) -> torch.Tensor:
    """A block's hidden states, whether it returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _precision(network: Network, options: AblationOptions):
    if options.precision == "bfloat16":
        return torch.autocast(network.device.type, dtype=torch.bfloat16)
    return nullcontext()
