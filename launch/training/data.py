"""A run's training and validation sets, opened as its configuration names them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import Config
from configs.checks import BUILTIN
from data import (
    Chain,
    Samples,
    batches,
    check_one_tokenizer,
    default_tokenizer,
    hub,
    open_dataset,
    refuse_changes,
)
from data import manifest as corpus_manifest
from data.files import read_json
from data.identity import changes
from l2e.files import own_folder
from l2e.hub import is_hub
from launch.checkpoint.stored import StoredCheckpoint
from launch.training.position import Position

if TYPE_CHECKING:
    from torch import Tensor

    from launch.engine.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
HASHED_SAMPLES = 1024  # of the order; enough to notice a changed corpus, seed or length


@dataclass(frozen=True)
class Paths:
    """Where a run's files really lie, once built-in and hub sources are on this machine."""

    training: Any
    validation: Any
    tokenizer: Path | None


@dataclass(frozen=True)
class Corpus:
    """What the training loop reads."""

    config: Config
    paths: Paths
    training: Samples
    validation: Samples
    laid_out: list[int]  # samples that the training set's order was made for, and later ones

    def training_batches(self, start: Position, layout: Layout) -> Iterator[Tensor]:
        """This rank's micro-batches from the first unread sample on."""
        return self.read(self.training, start.samples, layout)

    def validation_batches(self, layout: Layout) -> Iterator[Tensor]:
        """This rank's micro-batches of the held-out set, from its beginning."""
        return self.read(self.validation, 0, layout)

    def read(self, samples: Samples, first: int, layout: Layout) -> Iterator[Tensor]:
        train = self.config.train
        return batches(
            samples,
            first,
            train.global_batch_size,
            train.micro_batch_size,
            layout.data_rank,
            layout.data_size,
        )

    def describe(self) -> dict[str, Any]:
        """What the run's manifest and its checkpoints say of its data."""
        return {
            "training": self.training.identity(),
            "validation": self.validation.identity(),
            "order_hash": self.order_hash,
            "laid_out": self.laid_out,
            "bytes_per_token": self.bytes_per_token(),
            "end_of_text_token": self.end_of_text(),
            "tokenizer": str(self.paths.tokenizer) if self.paths.tokenizer else None,
        }

    def hold_against(self, before: dict[str, Any], say: Callable[[str], None]) -> None:
        """A run goes on with the data that it began with: `before`, as `data_of` tells it.

        Raises ValueError that says what changed. `say` is told of changes to the validation set,
        and of samples beyond those the run was laid out for.
        """
        self.refuse_other(before)
        # Last: to hash the order shuffles the corpus, and writes that down.
        if "order_hash" in before:
            refuse_differences(before, {"order_hash": self.order_hash})
        validation = self.validation.identity()
        for number, samples in enumerate(self.laid_out[1:], 1):
            say(f"more samples than planned: {samples:,} further ones, of seed +{number}")
        for change in changes(before.get("validation", validation), validation):
            say(f"the validation set has changed, its losses do not compare: {change}")

    def refuse_other(self, before: dict[str, Any]) -> None:
        """Raise ValueError where the training set is another than `before`; builds no order."""
        identity = self.training.identity()
        refuse_differences(before, identity.get("parts", [identity])[0])
        refuse_differences(before, {"training": identity})

    @cached_property
    def order_hash(self) -> str:
        """Hash of the first samples' tokens."""
        return self.training.order_hash(HASHED_SAMPLES)

    def end_of_text(self) -> str | None:
        """The token that ends the corpus's documents; None where no manifest tells."""
        path = self.paths.training
        first = path if isinstance(path, str) else next(iter(path))
        return corpus_manifest.recorded(first, "end_of_text_token")

    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text a validation token stands for; None where no manifest tells."""
        path = self.paths.validation or self.paths.training
        found = corpus_manifest.read(path) if isinstance(path, str) else None
        return found["text_bytes"] / found["tokens"] if found else None


def fetch(config: Config, folder: Path) -> Paths:
    """Bring what the configuration names onto this machine; built-in data is prepared once."""
    data, tokenizer = config.data, config.tokenizer.path
    if data.path == BUILTIN:
        return prepare_builtin(config, builtin_paths(config, folder))
    path = data.path
    if is_hub(path):
        assert isinstance(path, str)
        path = hub.fetch_tokens(path, Path(data.cache_dir or folder / "data"))
    if is_hub(tokenizer):
        assert tokenizer is not None
        tokenizer = str(hub.fetch_tokenizer(tokenizer))
    file = Path(tokenizer) if tokenizer else default_tokenizer(path)
    for problem in check_one_tokenizer(
        {"data.path": path, "data.validation_path": data.validation_path}, file
    ):
        raise problem
    return Paths(path, data.validation_path, file)


def already_here(config: Config, folder: Path) -> Paths | None:
    """As `fetch`, where nothing has to be fetched or prepared first; else None."""
    if config.data.path == BUILTIN:
        paths = builtin_paths(config, folder)
        return paths if corpus_manifest.path(paths.validation).exists() else None
    if is_hub(config.data.path) or is_hub(config.tokenizer.path):
        return None
    return fetch(config, folder)


def builtin_paths(config: Config, folder: Path) -> Paths:
    """Where the run's built-in corpus is, or will be."""
    prefix = Path(config.data.cache_dir or folder / "data") / "builtin"
    return Paths(str(prefix), f"{prefix}_validation", Path(f"{prefix}.tokenizer.model"))


def prepare_builtin(config: Config, paths: Paths) -> Paths:
    """Prepare Python's own standard library, by the command a user would type."""
    prefix = Path(paths.training)
    if not corpus_manifest.path(paths.validation).exists():
        command = [sys.executable, str(ROOT / "launch" / "prepare.py"), "--corpus", "builtin"]
        command += ["--train-tokenizer", "sentencepiece"]
        command += ["--vocab-size", str(config.tokenizer.vocab_size), "--output", str(prefix)]
        own_folder("data.cache_dir", prefix.parent)
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"preparing the built-in corpus failed: {' '.join(command)}")
    return paths


def refuse_differences(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Of what both say, everything must be the same."""
    known = before.keys() & now.keys()
    refuse_changes({key: before[key] for key in known}, {key: now[key] for key in known})


def data_of(checkpoint: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """What is known of the data that a checkpoint was trained on: see `Corpus.describe`.

    Older versions wrote it into the run's manifest alone, and without that their configuration
    still tells the seed, the length and the order.
    """
    stored = StoredCheckpoint(checkpoint)
    if "data" in stored.state:
        return stored.state["data"]
    train, data = stored.config.get("train"), stored.config.get("data")
    if stored.state["step"] == 0 or train is None or data is None:
        return {}  # weights alone
    told = {"sequence_length": data["sequence_length"], "order": data["order"]}
    told |= {"seed": train["seed"], "laid_out": [train["steps"] * train["global_batch_size"]]}
    if checkpoint.parent.name == "checkpoints":
        manifest = read_json(checkpoint.parent.parent / "manifest.json", say) or {}
        known = manifest.get("data", {})
        told |= {key: known[key] for key in ("training", "order_hash") if key in known}
    return told


def open_corpus(
    config: Config,
    folder: Path | None,
    paths: Paths,
    start: Position,
    laid_out: Sequence[int] = (),
) -> Corpus:
    """Open both sets; every process of a machine shares the shuffled maps in the run's folder.

    folder: None keeps the maps in this process. start: where the run goes on. laid_out: of a
    resumed run, the samples that its order was made for, see `Corpus`.
    """
    needed = start.samples_needed(config)
    sizes = list(laid_out) or [needed]
    if config.data.order == "preshuffled":
        sizes = [max(needed, *sizes)]  # a file's own order, which has no second epoch
    parts = [open_training(config, folder, paths, *size) for size in enumerate(sizes)]
    while (missing := needed - sum(map(len, parts))) > 0:
        parts.append(open_training(config, folder, paths, len(parts), missing))
        sizes.append(missing)
    training = parts[0] if len(parts) == 1 else Chain(parts)
    return Corpus(config, paths, training, open_validation(config, folder, paths), sizes)


def open_training(
    config: Config, folder: Path | None, paths: Paths, number: int, samples: int
) -> Samples:
    """The training set, in the run's order; its continuations are shuffled by seeds of their own.

    An order is that of a certain number of epochs, so a run that turns out to need more reads
    them after those it began with.
    """
    settings = common(config, folder, paths)
    settings["seed"] = (settings["seed"] + number) % 2**32
    return open_dataset(paths.training, samples=samples, order=config.data.order, **settings)


def open_validation(config: Config, folder: Path | None, paths: Paths) -> Samples:
    """The validation set: its own files, or the end of the training set's."""
    data = config.data
    return open_dataset(
        paths.validation or paths.training,
        samples=config.evaluate.batches * config.train.global_batch_size,
        order="neox" if paths.validation and data.order == "preshuffled" else data.order,
        part="validation",
        **common(config, folder, paths),
    )


def common(config: Config, folder: Path | None, paths: Paths) -> dict[str, Any]:
    """What both sets are opened with."""
    data = config.data
    return {
        "sequence_length": data.sequence_length,
        "seed": config.train.seed,
        "cache_dir": None if folder is None else data.cache_dir or folder / "data",
        "split": None if paths.validation else data.validation_fraction,
    }
