"""Monosemantic Scale and False Killing Rate during training, on a small fixed sample."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from l2e.analysis.activations import aggregate, first_tokens
from l2e.analysis.features import FeatureSet
from l2e.analysis.fkr import LAYER_SHARE, killed
from l2e.analysis.scale import RANDOM_NEURONS, kolmogorov_smirnov, layer_scale, passage_scale

# A forward pass is a third of a training step on the same tokens; half of the 1 % is left for the
# statistics themselves.
FORWARD_SHARE = 1 / 3
TIME_SHARE = 0.01 / 2


# What a model's layer shows: its name and activations [batch, positions, neurons].
Hook = Callable[[str, torch.Tensor], None]


class Encoder(Protocol):
    """A tokenizer, as far as the monitor needs one."""

    def encode(self, text: str) -> list[int]: ...


class Monitor:
    """Measures a model in training on the same few passages each time.

    The sample is cut and padded to `max_tokens`, so that every batch has one shape, as pipeline
    engines want; causal attention keeps the padding on the right from what counts.

        monitor = Monitor(read_features(path).sample(8), tokenizer, batch_size=4)
        if step % monitor.interval(tokens_per_step) == 0:
            metrics = monitor.run(observe)
    """

    def __init__(
        self, features: FeatureSet, tokenizer: Encoder, *, batch_size: int, max_tokens: int = 64
    ):
        """Raises ValueError if a feature has no passage longer than one token, which is skipped."""

        def encode(texts: list[str]) -> list[list[int]]:
            return [tokenizer.encode(text) for text in texts]

        tokens = first_tokens(encode, features.texts, max_tokens)
        usable = [row for row, ids in enumerate(tokens) if len(ids) > 1]
        self.features = features.subset(np.array(usable, dtype=np.int64))
        self.batch_size = batch_size
        # Whole batches only: the last one is filled up with passages that are not counted.
        rows = -(-len(usable) // batch_size) * batch_size
        self.tokens = torch.zeros(rows, max_tokens, dtype=torch.int64)
        self.valid = torch.zeros(rows, max_tokens, dtype=torch.bool)
        for row, source in enumerate(usable):
            length = len(tokens[source])
            self.tokens[row, :length] = torch.tensor(tokens[source])
            self.valid[row, 1:length] = True
        self.valid[len(usable) :, -1] = True

    def interval(self, tokens_per_step: int) -> int:
        """Steps between two runs so that they take at most about 1 % of the time."""
        steps = self.tokens.numel() * FORWARD_SHARE / (TIME_SHARE * tokens_per_step)
        return max(1, int(np.ceil(steps)))

    def run(
        self,
        observe: Callable[[torch.Tensor, Hook], object],
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda local: local,
    ) -> dict:
        """Measure the model as it is: {"layers": {name: {mean_ms, ks, fkr}}, "seconds"}.

        observe(tokens, hook): runs the model, without gradients, on tokens int64 [batch_size,
        max_tokens], and calls hook(name, activations) with each layer's [batch_size, max_tokens,
        neurons]. gather: with sharded neurons, joins [passages, local neurons] over the
        tensor-parallel ranks to [passages, neurons]. A layer of dead neurons has None throughout.
        """
        start = time.perf_counter()
        found: dict[str, list[torch.Tensor]] = defaultdict(list)
        for tokens, valid in zip(
            self.tokens.split(self.batch_size), self.valid.split(self.batch_size), strict=True
        ):

            def hook(name: str, activations: torch.Tensor, valid: torch.Tensor = valid) -> None:
                found[name].append(aggregate(activations, valid.to(activations.device), "max"))

            observe(tokens, hook)
        layers = {}
        for name, parts in found.items():
            passages = gather(torch.cat(parts)[: len(self.features)])
            layers[name] = self._measure(passages.cpu().numpy())
        return {"layers": layers, "seconds": time.perf_counter() - start}

    def _measure(self, z: np.ndarray) -> dict[str, float | None]:
        labels, count = self.features.labels, len(self.features.names)
        scale = layer_scale(z, labels, count)
        counts = killed(z, labels, count, (LAYER_SHARE,))
        if counts is None:
            return {"mean_ms": None, "ks": None, "fkr": None}
        some = np.flatnonzero(scale.alive)[:RANDOM_NEURONS]
        phi = passage_scale(z[:, some].astype(np.float64), scale.mean[some], scale.std[some])
        reached, false, _ = counts
        return {
            "mean_ms": float(scale.of_best()[scale.alive].mean()),
            "ks": kolmogorov_smirnov(phi, labels[:, None] == scale.best[some]),
            "fkr": float(false[0] / reached[0]),
        }
