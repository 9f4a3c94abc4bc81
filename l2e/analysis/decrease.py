"""Decrease ratio and total update ratio: what one optimizer step does to monosemanticity.

MEmeL's Table 4: with the most monosemantic activations of a batch inhibited in one of its ways,
take one step on the batch, feed it again, and compare each of those activations z with its new
value z*: the decrease ratio is 1 - phi(z*) / phi(z), the total update ratio |z* / z - 1|.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from l2e.analysis.activations import first_tokens
from l2e.analysis.features import FeatureSet
from l2e.analysis.networks import Network
from l2e.attachment import Handle
from l2e.config import L2EConfig, LayerChoice, select_layers
from l2e.progress import Progress
from l2e.sharding import Sharding

ARMS: dict[str, dict[str, Any]] = {
    "original": {"method": "none"},
    "naive a": {"method": "deactivate", "delta": 0.0},
    "naive b": {"method": "deactivate", "delta": -1.0},
    "reversed": {"method": "deactivate", "delta": 1.0},
}


@dataclass(frozen=True)
class Settings:
    """layers: the inhibited blocks. topk: activations selected a token. learning_rate: of the one
    step of plain SGD. batches: how many are measured, each from the same weights, after as many
    again have given the statistics. max_tokens, rows: a batch's size."""

    layers: LayerChoice | list[int] = "mid2"
    topk: int = 10
    learning_rate: float = 0.01
    batches: int = 8
    max_tokens: int = 128
    rows: int = 8

    @property
    def config(self) -> L2EConfig:
        """Statistics of earlier batches, and the k largest scales of each token."""
        return L2EConfig(
            method="none",
            selection="topk",
            topk=self.topk,
            layers=self.layers,
            late_start_step=self.batches,
            forget_step=self.batches,
        )


def analyze_decrease(
    network: Network, features: FeatureSet, settings: Settings, progress: bool = True
) -> dict:
    """The decrease verb's result: for each arm both ratios' mean and standard error, in percent.

    The model's weights are left as they were. Raises ValueError if the texts are too short.
    """
    batches = _batches(network, features, settings)
    modules = _activations(network, settings)
    start = copy.deepcopy(network.model.state_dict())
    statistics = _statistics(network, modules, batches[: settings.batches], settings)
    ratios: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    measured = batches[settings.batches :]
    total = len(measured) * len(ARMS)
    bar = Progress(total=total, desc="decrease", unit="steps", progress=progress)
    try:
        with bar:
            for batch in measured:
                before = _observe(network, modules, batch)
                for arm, keys in ARMS.items():
                    config = replace(settings.config, **keys)
                    _step(network, modules, batch, config, statistics, settings.learning_rate)
                    after = _observe(network, modules, batch)
                    network.model.load_state_dict(start)
                    ratios[arm].append(_ratios(before, after, statistics, config))
                    bar.update()
    finally:
        network.model.load_state_dict(start)
    return {
        "layers": list(modules),
        "topk": settings.topk,
        "learning_rate": settings.learning_rate,
        "batches": len(measured),
        "tokens_per_batch": settings.rows * settings.max_tokens,
        "arms": {arm: _summary(torch.tensor(pairs)) for arm, pairs in ratios.items()},
    }


def _batches(network: Network, features: FeatureSet, settings: Settings) -> list[Tensor]:
    """Passages joined and cut into token batches [rows, max_tokens], without padding."""
    size = settings.rows * settings.max_tokens
    wanted = 2 * settings.batches

    def encode(texts: list[str]) -> list[list[int]]:
        return network.tokenizer(texts)["input_ids"]

    passages = first_tokens(encode, features.texts, size * wanted)
    tokens = [token for ids in passages for token in ids]
    if len(tokens) < size * wanted:
        raise ValueError(
            f"{features.name}: {len(tokens)} tokens, but {wanted} batches of {settings.rows} x "
            f"{settings.max_tokens} need {size * wanted}; ask for fewer batches or give more text"
        )
    joined = torch.tensor(tokens[: size * wanted], device=network.device)
    return list(joined.view(wanted, settings.rows, settings.max_tokens))


def _activations(network: Network, settings: Settings) -> dict[str, nn.Module]:
    """The inhibited blocks' non-linearities by block number."""
    chosen = select_layers(settings.layers, len(network.layers))
    return {str(number): network.layers[number].activation for number in chosen}


@contextmanager
def _attached(modules: dict[str, nn.Module], config: L2EConfig) -> Iterator[Handle]:
    """The method at work on these modules alone: dropout elsewhere stays off."""
    handle = Handle(modules, config, observe_no_grad=True, sharding=Sharding())
    for module in modules.values():
        module.train()
    try:
        yield handle
    finally:
        handle.detach()
        for module in modules.values():
            module.eval()


def _statistics(
    network: Network, modules: dict[str, nn.Module], batches: list[Tensor], settings: Settings
) -> dict[str, Tensor]:
    with _attached(modules, settings.config) as handle, torch.no_grad():
        for batch in batches:
            network.model(batch)
            handle.step()
        return handle.state_dict()


def _observe(network: Network, modules: dict[str, nn.Module], batch: Tensor) -> dict[str, Tensor]:
    """Each module's activations on the batch, [tokens, neurons]."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, name=name: found.update({name: out.flatten(0, 1).double()})
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        network.model(batch)
    for hook in hooks:
        hook.remove()
    return found


def _step(
    network: Network,
    modules: dict[str, nn.Module],
    batch: Tensor,
    config: L2EConfig,
    statistics: dict[str, Tensor],
    learning_rate: float,
) -> None:
    """One step of SGD on the batch's language-model loss, inhibited as the arm says."""
    with _attached(modules, config) as handle:
        handle.load_state_dict(statistics)
        logits = network.model(batch).logits[:, :-1].flatten(0, 1)
        network.model.zero_grad()
        nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in network.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(learning_rate * parameter.grad)
    network.model.zero_grad()


def _ratios(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    statistics: dict[str, Tensor],
    config: L2EConfig,
) -> tuple[float, float]:
    """Both ratios' mean over the selected activations of all layers."""
    decrease, update = [], []
    for name, z in before.items():
        mean, var = (statistics[f"{name}.{key}"].to(z) for key in ("mean", "var"))
        denominator = var + config.eps * var.mean()
        phi, phi_after = ((value - mean) ** 2 / denominator for value in (z, after[name]))
        chosen = phi.topk(config.topk, dim=1).indices
        decrease.append((1 - phi_after.gather(1, chosen) / phi.gather(1, chosen)).flatten())
        update.append((after[name].gather(1, chosen) / z.gather(1, chosen) - 1).abs().flatten())
    return float(torch.cat(decrease).mean()), float(torch.cat(update).mean())


def _summary(pairs: Tensor) -> dict[str, float]:
    """[batches, 2] -> percent, with the standard error over batches (of one batch, NaN)."""
    mean = 100 * pairs.mean(0)
    spread = (100 * pairs - mean).square().sum(0) / (len(pairs) - 1)
    error = (spread / len(pairs)).sqrt()
    return {
        "decrease_ratio_percent": float(mean[0]),
        "decrease_ratio_error": float(error[0]),
        "total_update_ratio_percent": float(mean[1]),
        "total_update_ratio_error": float(error[1]),
    }
