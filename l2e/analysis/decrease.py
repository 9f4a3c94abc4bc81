"""Decrease ratio and total update ratio: what one optimizer step does to monosemanticity.

MEmeL's Table 4: with the most monosemantic activations of a batch inhibited in one of its ways,
take one step on the batch, feed it again, and compare each of those activations z with its new
value z*: the decrease ratio is 1 - phi(z*) / phi(z), the total update ratio |z* / z - 1|.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l2e.analysis.analysis import Analysis, Options, option
from l2e.analysis.figures import Panel, Panels
from l2e.analysis.tables import Table
from l2e.config import L2EConfig, select_layers
from l2e.progress import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from l2e.analysis.features import FeatureSet
    from l2e.analysis.networks import Network
    from l2e.analysis.subject import Subject
    from l2e.attachment import Handle

ARMS: dict[str, dict[str, Any]] = {
    "original": {"method": "none"},
    "naive a": {"method": "deactivate", "delta": 0.0},
    "naive b": {"method": "deactivate", "delta": -1.0},
    "reversed": {"method": "deactivate", "delta": 1.0},
}


@dataclass(frozen=True)
class DecreaseOptions(Options):
    layers: str = option(
        "mid2", "inhibited blocks: mid2, mid_third, top_bottom, all, or numbers such as 2,3"
    )
    topk: int = option(10, "selected of each token", least=1)
    learning_rate: float = option(0.01, "of the one step of plain SGD", least=0)
    batches: int = option(
        8, "measured, each from the same weights, after as many again for the statistics", least=1
    )

    @property
    def config(self) -> L2EConfig:
        """Statistics of earlier batches, and the k largest scales of each token.

        Raises ValueError for `layers` that are no choice of blocks.
        """
        layers: Any = self.layers
        if layers[:1].isdigit():
            if not all(number.strip().isdigit() for number in layers.split(",")):
                raise ValueError(f"layers {layers}: write block numbers as in 2,3")
            layers = [int(number) for number in layers.split(",")]
        return L2EConfig(
            method="none",
            selection="topk",
            topk=self.topk,
            layers=layers,
            late_start_step=self.batches,
            forget_step=self.batches,
        )


def measure(subject: Subject, options: DecreaseOptions) -> dict:
    network = subject.network
    tokens = min(subject.options.max_tokens, network.max_positions)
    found = analyze_decrease(network, subject.features, options, max_tokens=tokens)
    return {"model": network.name} | found


def analyze_decrease(
    network: Network,
    features: FeatureSet,
    options: DecreaseOptions,
    max_tokens: int = 128,
    rows: int = 8,
    progress: bool = True,
) -> dict:
    """The decrease analysis's numbers: for each arm both ratios' mean and standard error, in
    percent. A batch is `rows` x `max_tokens`.

    The model's weights are left as they were. Raises ValueError if the texts are too short, or a
    layer has fewer neurons than are to be selected.
    """
    import torch

    if options.topk > network.neurons:
        raise ValueError(f"topk {options.topk}: a layer has {network.neurons} neurons")
    config = options.config
    names = _activations(network, config)
    batches = _batches(network, features, 2 * options.batches, rows, max_tokens)
    start = copy.deepcopy(network.model.state_dict())
    statistics = _statistics(network, names, batches[: options.batches], config)
    ratios: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    measured = batches[options.batches :]
    total = len(measured) * len(ARMS)
    bar = Progress(total=total, desc="decrease", unit="steps", progress=progress)
    try:
        with bar:
            for batch in measured:
                before = _observe(network, names, batch)
                for arm, keys in ARMS.items():
                    method = replace(config, **keys)
                    _step(network, names, batch, method, statistics, options.learning_rate)
                    after = _observe(network, names, batch)
                    network.model.load_state_dict(start)
                    ratios[arm].append(_ratios(before, after, statistics, method))
                    bar.update()
    finally:
        network.model.load_state_dict(start)
    return {
        "layers": [str(number) for number in names],
        "topk": options.topk,
        "learning_rate": options.learning_rate,
        "batches": len(measured),
        "tokens_per_batch": rows * max_tokens,
        "arms": {arm: _summary(torch.tensor(pairs)) for arm, pairs in ratios.items()},
    }


def _batches(
    network: Network, features: FeatureSet, count: int, rows: int, max_tokens: int
) -> list[Tensor]:
    """Passages joined and cut into `count` batches [rows, max_tokens], without padding."""
    import torch

    from l2e.analysis.activations import first_tokens

    size = rows * max_tokens

    def encode(texts: list[str]) -> list[list[int]]:
        return network.tokenizer(texts)["input_ids"]

    passages = first_tokens(encode, features.texts, size * count)
    tokens = [token for ids in passages for token in ids]
    if len(tokens) < size * count:
        raise ValueError(
            f"{features.name}: {len(tokens)} tokens, but {count} batches of {rows} x "
            f"{max_tokens} need {size * count}; ask for fewer batches or give more text"
        )
    joined = torch.tensor(tokens[: size * count], device=network.device)
    return list(joined.view(count, rows, max_tokens))


def _activations(network: Network, config: L2EConfig) -> dict[int, str]:
    """The names of the inhibited blocks' non-linearities in the model, by block number."""
    names = {module: name for name, module in network.model.named_modules()}
    chosen = select_layers(config.layers, len(network.layers))
    return {number: names[network.layers[number].activation] for number in chosen}


@contextmanager
def _attached(network: Network, names: dict[int, str], config: L2EConfig) -> Iterator[Handle]:
    """The method at work on these modules alone: dropout elsewhere stays off."""
    from l2e.attachment import Handle
    from l2e.sharding import Sharding

    modules = {name: network.model.get_submodule(name) for name in names.values()}
    handle = Handle(modules, config, model=network.model, observe_no_grad=True, sharding=Sharding())
    for module in modules.values():
        module.train()
    try:
        yield handle
    finally:
        handle.detach()
        for module in modules.values():
            module.eval()


def _statistics(
    network: Network, names: dict[int, str], batches: list[Tensor], config: L2EConfig
) -> dict[str, Tensor]:
    import torch

    with _attached(network, names, config) as handle, torch.no_grad():
        for batch in batches:
            network.model(batch)
            handle.step()
        return handle.state_dict()


def _observe(network: Network, names: dict[int, str], batch: Tensor) -> dict[str, Tensor]:
    """The activations on the batch, [tokens, neurons], by name."""
    import torch

    from l2e.analysis.activations import watch

    found: dict[str, Tensor] = {}

    def hook(layer: int, _: Tensor, post: Tensor) -> None:
        if layer in names:
            found[names[layer]] = post.flatten(0, 1).double()

    with watch(network, hook), torch.no_grad():
        network.model(batch)
    return found


def _step(
    network: Network,
    names: dict[int, str],
    batch: Tensor,
    config: L2EConfig,
    statistics: dict[str, Tensor],
    learning_rate: float,
) -> None:
    """One step of SGD on the batch's language-model loss, inhibited as the arm says."""
    import torch
    from torch import nn

    with _attached(network, names, config) as handle:
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
    import torch

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


def panels(result: dict) -> Panels:
    """Decrease ratio of each method, with two standard errors over batches."""
    arms = result["arms"]

    def bars(axes: Axes) -> None:
        means = [arm["decrease_ratio_percent"] for arm in arms.values()]
        errors = [2 * arm["decrease_ratio_error"] for arm in arms.values()]
        axes.bar(list(arms), means, yerr=errors, capsize=5, width=0.6)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_ylabel("mean decrease of MS after one step (%)")

    return Panels([Panel("decrease", bars)])


def notes(result: dict) -> list[str]:
    return [
        f"One step of SGD (rate {result['learning_rate']:g}) on {result['batches']} batches of "
        f"{result['tokens_per_batch']:,} tokens, each from the same weights, and the batch again: "
        f"how much the {result['topk']} most monosemantic activations of a token in layers "
        f"{', '.join(result['layers'])} lost of their MS, and how much they changed. MEmeL's order "
        "is naive b below original below reversed."
    ]


def tables(result: dict) -> list[Table]:
    head = ["step", "decrease of MS (%)", "± batches", "change of activation (%)", "± batches"]
    keys = ["decrease_ratio_percent", "decrease_ratio_error"]
    keys += ["total_update_ratio_percent", "total_update_ratio_error"]
    rows = [[name, *(arm[key] for key in keys)] for name, arm in result["arms"].items()]
    return [Table(head, rows)]


def points(result: dict) -> list[dict[str, float | None]]:
    arms = result["arms"].items()
    return [{f"decrease of MS (%), {name}": arm["decrease_ratio_percent"] for name, arm in arms}]


ANALYSIS = Analysis(
    name="decrease",
    title="Decrease ratio",
    help="what one step of SGD does to the most monosemantic activations, by method",
    on=("model", "features"),
    options=DecreaseOptions,
    measure=measure,
    panels=panels,
    notes=notes,
    tables=tables,
    points=points,
)
