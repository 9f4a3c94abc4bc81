"""What an analysis looks at: a model, feature passages, checkpoints of a series."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e.analysis.analysis import Options, option

if TYPE_CHECKING:
    from l2e.analysis.activations import Activations
    from l2e.analysis.features import FeatureSet
    from l2e.analysis.networks import Network
    from l2e.analysis.probing import Probe
    from l2e.analysis.series import SeriesCheckpoint


@dataclass(frozen=True)
class ModelOptions(Options):
    """How a model is loaded."""

    dtype: str = option("float32", "of the weights", choices=("float32", "bfloat16", "float16"))
    devices: Sequence[str] = option(
        ("cpu",), "e.g. cuda:0 cuda:1, which share the passages", of=str, nargs="+"
    )


@dataclass(frozen=True)
class PassageOptions(Options):
    """How passages are read."""

    passages: int | None = option(
        None, "at most so many of each feature (default: all)", of=int, least=1
    )
    max_tokens: int = option(256, "where passages are cut", least=1)


@dataclass(frozen=True)
class ActivationOptions(Options):
    """How activations are collected."""

    skip: int = option(
        1, "first tokens that don't count; 25 for data subsets, 100 for code", least=0
    )
    stored_as: str = option("float16", "on disk", choices=("float16", "float32"))
    cache: str | None = option(
        None, "where activations are kept (default: OUTPUT/activations)", of=str, metavar="DIR"
    )


@dataclass(frozen=True)
class SubjectOptions(ActivationOptions, PassageOptions, ModelOptions):
    """All of these."""


class Subject:
    """A model, feature passages and checkpoints, each opened when first asked for.

        Subject("EleutherAI/pythia-70m", "languages.jsonl.gz", passages=50)

    model: a folder in Hugging Face form, an id, id@revision, or a `Network`. features: a file, or a
    `FeatureSet`. checkpoints: folders or ids of a series. in_hugging_face_form: makes a folder in
    Hugging Face form of a source that is in another. options: those of `SubjectOptions`.

    Raises ValueError for an option out of bounds; and for a part that can't be read, or was not
    given, when it is first asked for.
    """

    def __init__(
        self,
        model: str | Path | Network | None = None,
        features: str | Path | FeatureSet | None = None,
        checkpoints: str | Path | Sequence[str | Path] = (),
        in_hugging_face_form: Callable[[str], str] = str,
        **options: Any,
    ):
        self.options = SubjectOptions(**options)
        self._model, self._features = model, features
        self._checkpoints = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
        self._in_hugging_face_form = in_hugging_face_form
        self._collected: dict[tuple[str, ...], Activations] = {}
        self._probes: dict[str, list[Probe]] = {}

    @cached_property
    def network(self) -> Network:
        from l2e.analysis.networks import Network, open_network

        if isinstance(self._model, Network):
            return self._model
        if self._model is None:
            raise ValueError("no model: name one to measure")
        return open_network(
            self._in_hugging_face_form(str(self._model)),
            device=self.options.devices[0],
            dtype=self.options.dtype,
        )

    @cached_property
    def all_features(self) -> FeatureSet:
        """The feature set as it is given."""
        from l2e.analysis.features import FeatureSet, read_features

        if isinstance(self._features, FeatureSet):
            return self._features
        if self._features is None:
            raise ValueError("no feature passages: name a file of them")
        return read_features(self._features)

    @property
    def has_features(self) -> bool:
        return self._features is not None

    @cached_property
    def features(self) -> FeatureSet:
        """At most `passages` of each feature."""
        count = self.options.passages
        return self.all_features.sample(count) if count else self.all_features

    @cached_property
    def series(self) -> list[SeriesCheckpoint]:
        """The checkpoints as they were named. Raises ValueError for a missing or equal step."""
        from l2e.analysis.series import read_series

        return read_series([str(name) for name in self._checkpoints], self._in_hugging_face_form)

    def at(self, checkpoint: SeriesCheckpoint) -> Subject:
        """One checkpoint of the series as the model, on the same passages."""
        features = self.all_features if self.has_features else None
        options = asdict(self.options) | {"cache": str(self._cache)}
        return Subject(checkpoint.source, features, **options)

    def activations(self, kind: str = "post_max") -> Activations:
        """Those of all passages, collected in one pass or found; `kind` among others."""
        from l2e.analysis.activations import Collection, collect

        kinds = tuple(dict.fromkeys(["post_max", "pre_mean", kind]))
        if kinds not in self._collected:
            own = self.options
            what = Collection(kinds, own.skip, own.max_tokens, own.stored_as)
            devices = list(own.devices) if len(own.devices) > 1 else None
            self._collected[kinds] = collect(
                self.network, self.features, what, self._cache, devices
            )
        return self._collected[kinds]

    def probes(self, kind: str) -> list[Probe]:
        """The monosemantic search, best first; done once."""
        from l2e.analysis.probing import find_monosemantic

        if kind not in self._probes:
            self._probes[kind] = find_monosemantic(self.activations(kind), kind)
        return self._probes[kind]

    def about(self, kind: str) -> dict:
        """What was measured on what, for a result."""
        activations = self.activations(kind)
        return {
            "model": self.network.name,
            "parameters": self.network.parameters,
            "features": {
                "name": activations.features.name,
                "passages": activations.features.counts(),
                "passages_left_out": activations.dropped,
                "hash": activations.features.digest(),
            },
        }

    @cached_property
    def _cache(self) -> Path:
        """Where activations are kept: a folder that goes with the subject if none is named."""
        if self.options.cache is not None:
            return Path(self.options.cache)
        self._temporary = tempfile.TemporaryDirectory(prefix="l2e-activations-")
        return Path(self._temporary.name)
