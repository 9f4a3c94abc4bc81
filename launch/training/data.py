"""A run's training and validation sets, opened as its configuration names them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import Config
from configs.checks import BUILTIN, is_hub
from data import Samples, batches, hub, open_dataset, refuse_changes
from data import manifest as corpus_manifest

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

    def training_batches(self, step: int, layout: Layout) -> Iterator[Tensor]:
        """This rank's micro-batches from `step` on."""
        return self.read(self.training, step, layout)

    def validation_batches(self, layout: Layout) -> Iterator[Tensor]:
        """This rank's micro-batches of the held-out set, from its beginning."""
        return self.read(self.validation, 0, layout)

    def read(self, samples: Samples, step: int, layout: Layout) -> Iterator[Tensor]:
        train = self.config.train
        return batches(
            samples,
            step,
            train.global_batch_size,
            train.micro_batch_size,
            layout.data_rank,
            layout.data_size,
        )

    def describe(self) -> dict[str, Any]:
        """What the run's manifest says of its data."""
        return {
            "training": self.training.identity(),
            "order_hash": self.training.order_hash(HASHED_SAMPLES),
            "bytes_per_token": self.bytes_per_token(),
            "tokenizer": str(self.paths.tokenizer) if self.paths.tokenizer else None,
        }

    def refuse_changes(self, folder: Path) -> None:
        """A run goes on with the data that it began with, which its folder's manifest tells.

        Raises ValueError that says what changed.
        """
        path = folder / "manifest.json"
        if path.exists():
            before, now = json.loads(path.read_text(encoding="utf-8"))["data"], self.describe()
            compared = ("training", "order_hash")
            refuse_changes({k: before[k] for k in compared}, {k: now[k] for k in compared})

    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text a validation token stands for; None where no manifest tells."""
        path = self.paths.validation or self.paths.training
        found = corpus_manifest.read(path) if isinstance(path, str) else None
        return found["text_bytes"] / found["tokens"] if found else None


def fetch(config: Config, folder: Path) -> Paths:
    """Bring what the configuration names onto this machine; built-in data is prepared once."""
    data, tokenizer = config.data, config.tokenizer.path
    if data.path == BUILTIN:
        return prepare_builtin(config, Path(data.cache_dir or folder / "data") / "builtin")
    path = data.path
    if is_hub(path):
        assert isinstance(path, str)
        path = hub.fetch_tokens(path, Path(data.cache_dir or folder / "data"))
    if is_hub(tokenizer):
        assert tokenizer is not None
        tokenizer = str(hub.fetch_tokenizer(tokenizer))
    return Paths(path, data.validation_path, Path(tokenizer) if tokenizer else None)


def prepare_builtin(config: Config, prefix: Path) -> Paths:
    """Prepare Python's own standard library, by the command a user would type."""
    paths = Paths(str(prefix), f"{prefix}_validation", Path(f"{prefix}.tokenizer.model"))
    if not corpus_manifest.path(paths.validation).exists():
        command = [sys.executable, str(ROOT / "launch" / "prepare.py"), "--corpus", "builtin"]
        command += ["--train-tokenizer", "sentencepiece"]
        command += ["--vocab-size", str(config.tokenizer.vocab_size), "--output", str(prefix)]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"preparing the built-in corpus failed: {' '.join(command)}")
    return paths


def open_corpus(config: Config, folder: Path, paths: Paths) -> Corpus:
    """Open both sets; every process of a machine shares the shuffled maps."""
    training = open_training(config, folder, paths)
    return Corpus(config, paths, training, open_validation(config, folder, paths))


def open_training(config: Config, folder: Path, paths: Paths) -> Samples:
    """The training set, in the run's order."""
    train = config.train
    return open_dataset(
        paths.training,
        samples=train.steps * train.global_batch_size,
        order=config.data.order,
        **common(config, folder, paths),
    )


def open_validation(config: Config, folder: Path, paths: Paths) -> Samples:
    """The validation set: its own files, or the end of the training set's."""
    data = config.data
    return open_dataset(
        paths.validation or paths.training,
        samples=config.evaluate.batches * config.train.global_batch_size,
        order="neox" if paths.validation and data.order == "preshuffled" else data.order,
        part="validation",
        **common(config, folder, paths),
    )


def common(config: Config, folder: Path, paths: Paths) -> dict[str, Any]:
    """What both sets are opened with."""
    data = config.data
    return {
        "sequence_length": data.sequence_length,
        "seed": config.train.seed,
        "cache_dir": data.cache_dir or folder / "data",
        "split": None if paths.validation else data.validation_fraction,
    }
