"""One pass over a feature dataset: every MLP neuron's activation, aggregated per passage.

The arrays stream to memory-mapped files, so that a model's neurons times the passages need not fit
in memory, and are kept under a hash of the weights, the texts and the settings.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from l2e.analysis.features import FeatureSet, distinct
from l2e.analysis.kinds import KINDS
from l2e.analysis.networks import Network
from l2e.files import fresh_folder, refuse_foreign
from l2e.progress import Progress

CHARACTERS_A_TOKEN = 32  # of a text, read at first; few tokens are longer


@dataclass(frozen=True)
class Collection:
    """How activations are collected.

    kinds: which of KINDS to keep. skip: first tokens of each passage that don't count (sparse
    probing: 1 for natural language, 100 for code, 25 for data subsets). max_tokens: where passages
    are cut. stored_as: float16, or float32 where a model's activations exceed 65,504.
    """

    kinds: tuple[str, ...] = ("post_max", "pre_mean")
    skip: int = 1
    max_tokens: int = 256
    stored_as: str = "float16"
    tokens_per_batch: int = 8192

    def __post_init__(self):
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"activation kinds {sorted(unknown)}: known are {', '.join(KINDS)}")
        if self.skip >= self.max_tokens:
            raise ValueError(
                f"skipping {self.skip} tokens of passages cut at {self.max_tokens} leaves none; "
                "lower skip or raise max_tokens"
            )


@dataclass(frozen=True)
class Activations:
    """What one pass collected; arrays are memory-mapped files in `folder`.

    features: the passages that had a valid token. dropped: how many had none.
    """

    folder: Path
    key: str
    features: FeatureSet
    dropped: int
    kinds: tuple[str, ...]
    num_layers: int

    def layer(self, kind: str, layer: int) -> np.ndarray:
        """One layer's activations, [passages, neurons], memory-mapped in the stored dtype."""
        return np.load(self.folder / f"{kind}.npy", mmap_mode="r")[layer]


def collect(
    network: Network,
    features: FeatureSet,
    settings: Collection,
    cache: Path,
    devices: list[str] | None = None,
    progress: bool = True,
) -> Activations:
    """Collect `settings.kinds` of all neurons on all passages, or find them in `cache`.

    devices: where copies of the model run, each on its share of the batches; default: where the
    model is. Raises ValueError if a feature has no passage with a valid token.
    """
    tokens = tokenize(network, features.texts, settings.max_tokens)
    lengths = np.array([len(ids) for ids in tokens])
    usable = np.flatnonzero(lengths > settings.skip)
    dropped = len(tokens) - len(usable)
    if dropped:
        print(f"{features.name}: {dropped} passages of at most {settings.skip} tokens left out")
        features = features.subset(usable)
        tokens = [tokens[row] for row in usable]
        lengths = lengths[usable]
    features = replace(features, text_of=distinct(map(tuple, tokens)))  # as far as they are read

    key = _key(network, tokens, settings)
    folder = cache / f"{features.name}-{key}"
    result = Activations(
        folder, key, features, dropped, settings.kinds, num_layers=len(network.layers)
    )
    if folder.is_dir():
        refuse_foreign("cache", folder)
        print(f"activations found in {folder}")
        return result

    cache.mkdir(parents=True, exist_ok=True)
    temporary = fresh_folder(cache, ".collecting-")
    try:
        shape = (len(network.layers), len(tokens), network.neurons)
        arrays = {
            kind: np.lib.format.open_memmap(
                temporary / f"{kind}.npy", mode="w+", dtype=settings.stored_as, shape=shape
            )
            for kind in settings.kinds
        }
        batches = length_batches(lengths, settings.tokens_per_batch)
        replicas = _replicas(network, devices)
        with Progress(
            total=len(tokens), desc="activations", unit="passages", progress=progress
        ) as bar:

            def run(share: int) -> None:
                for rows in batches[share :: len(replicas)]:
                    _collect_batch(
                        replicas[share], [tokens[r] for r in rows], rows, arrays, settings
                    )
                    bar.update(len(rows))

            with ThreadPoolExecutor(len(replicas)) as pool:
                list(pool.map(run, range(len(replicas))))
        for array in arrays.values():
            array.flush()
        (temporary / "settings.json").write_text(json.dumps(asdict(settings)))
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return result


def tokenize(network: Network, texts: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, cut at max_tokens and at the model's longest context."""
    limit = min(max_tokens, network.max_positions)

    def encode(texts: list[str]) -> list[list[int]]:
        return network.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]

    return first_tokens(encode, texts, limit)


def first_tokens(
    encode: Callable[[list[str]], list[list[int]]], texts: list[str], limit: int
) -> list[list[int]]:
    """The first `limit` token ids of each text, from no more of it than they need.

    encode: the ids of texts. A long text is read as far as twice as much gives the same ids.
    """
    size = CHARACTERS_A_TOKEN * limit
    found = [ids[:limit] for ids in encode([text[:size] for text in texts])]
    for row, text in enumerate(texts):
        read = size
        while read < len(text):
            read *= 2
            [longer] = encode([text[:read]])
            settled = len(longer) >= limit and longer[:limit] == found[row]
            found[row] = longer[:limit]
            if settled:
                break
    return found


def length_batches(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Rows in batches of like length, longest first, of about tokens_per_batch with padding."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def pad(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, int64 [batch, positions], and where they are real, bool."""
    width = max(len(ids) for ids in tokens)
    ids = torch.zeros(len(tokens), width, dtype=torch.long)
    mask = torch.zeros(len(tokens), width, dtype=torch.bool)
    for row, passage in enumerate(tokens):
        ids[row, : len(passage)] = torch.tensor(passage)
        mask[row, : len(passage)] = True
    return ids.to(device), mask.to(device)


def aggregate(values: torch.Tensor, valid: torch.Tensor, how: str) -> torch.Tensor:
    """Max or mean over each passage's valid tokens, float32 [batch, neurons].

    values: [batch, positions, neurons]; valid: bool [batch, positions],
    at least one true entry a row.
    """
    if how == "max":
        return values.masked_fill(~valid.unsqueeze(-1), -torch.inf).amax(dim=1).float()
    weight = valid.unsqueeze(-1).float()
    return (values.float() * weight).sum(dim=1) / weight.sum(dim=1)


@contextmanager
def watch(network: Network, hook) -> Iterator[None]:
    """Call hook(layer, pre, post) with each block's hidden units, [batch, positions, neurons]."""
    with ExitStack() as hooks:
        for number, layer in enumerate(network.layers):
            hooks.enter_context(
                layer.activation.register_forward_hook(
                    lambda _, inputs, output, number=number: hook(number, inputs[0], output)
                )
            )
        yield


def passage_activations(
    network: Network, tokens: list[list[int]], kinds: tuple[str, ...], skip: int
) -> dict[str, list[torch.Tensor]]:
    """One batch of passages: for each kind and layer, float32 [batch, neurons]."""
    ids, mask = pad(tokens, network.device)
    valid = mask.clone()
    valid[:, :skip] = False
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}

    def hook(layer: int, pre: torch.Tensor, post: torch.Tensor) -> None:
        for kind in kinds:
            site, how = kind.split("_")
            found[kind].append(aggregate(pre if site == "pre" else post, valid, how))

    with watch(network, hook), torch.no_grad():
        network.hidden(ids, mask)
    return found


def _collect_batch(network, tokens, rows, arrays, settings) -> None:
    found = passage_activations(network, tokens, settings.kinds, settings.skip)
    largest = np.finfo(settings.stored_as).max
    for kind, layers in found.items():
        for layer, values in enumerate(layers):
            block = values.cpu().numpy()
            if not np.abs(block).max() <= largest:
                raise ValueError(
                    f"layer {layer} has an activation of {np.abs(block).max()}, beyond "
                    f"{settings.stored_as}; use --stored-as float32, or check the model's weights"
                )
            arrays[kind][layer, rows] = block


def _replicas(network: Network, devices: list[str] | None) -> list[Network]:
    if not devices:
        return [network]
    return [
        Network(copy.deepcopy(network.model).to(device), network.tokenizer, network.name)
        for device in devices
    ]


def _key(network: Network, tokens: list[list[int]], settings: Collection) -> str:
    """A hash of everything the numbers depend on: weights, token ids, settings."""
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in network.model.state_dict().items():
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    state.update(json.dumps([tokens, asdict(settings)]).encode())
    return state.hexdigest()
