"""A checkpoint on disk without an engine: its configuration, tensors, tokenizer and model."""

import json
import re
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data.files import sha256
from l2e.memory import LARGER_MACHINE, refuse_larger
from launch.checkpoint import folders
from model.config import ModelConfig
from model.gpt_neox import GPTNeoX
from model.parameters import parameter_shapes

MODEL = "model"
STATE = "state.json"
CONFIG = "config.json"
PART = re.compile(r"(?P<kind>.+)-\d+-of-\d+\.safetensors")  # see `file_name`
L2E = "l2e.safetensors"
RANDOM = "random.safetensors"
# The tokenizer lies beside the weights, here and in Hugging Face's form, under one of these names.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What says beside a tokenizer, in Hugging Face's form, which of its tokens are special.
GENERATION = "generation_config.json"
IDENTITY_FILES = ("tokenizer_config.json", "special_tokens_map.json", GENERATION)


def identity_files(tokenizer: Path) -> list[Path]:
    """The files beside a tokenizer's own that belong to it."""
    if tokenizer.name not in TOKENIZER_FILES:
        return []
    found = [tokenizer.with_name(name) for name in IDENTITY_FILES]
    return [path for path in found if path.is_file()]


def file_name(kind: str, number: int, total: int) -> str:
    """Of the file that holds some of the `kind` tensors: the model's or an optimizer's moment."""
    return f"{kind}-{number:05d}-of-{total:05d}.safetensors"


class StoredCheckpoint:
    """The folder of one checkpoint; tensors are read when asked for."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def cannot(self, error: OSError) -> str:
        """What a failing disk means to a user."""
        return f"cannot read the checkpoint {self.folder}: {error.strerror} (errno {error.errno})"

    @cached_property
    def state(self) -> dict[str, Any]:
        """What `checkpoint.save` was told, and how the state was made: see `state.json`."""
        state = self._read(STATE, {"step": int, "tokens": int})
        for key, kind in {"samples": int, "data": dict}.items():  # which came with time
            if key in state:
                self._hold(STATE, state, key, kind)
        return state

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's configuration, as its sections."""
        return self._read(CONFIG, {"model": dict})

    def _read(self, name: str, entries: dict[str, type]) -> dict[str, Any]:
        """A JSON file that has the entries. Raises ValueError where a later version, or a hand,
        wrote it in another form."""
        content = json.loads((self.folder / name).read_bytes())
        for key, kind in entries.items():
            self._hold(name, content, key, kind)
        return content

    def _hold(self, name: str, content: Any, key: str, kind: type) -> None:
        """Raise ValueError where an entry is missing, of another kind, or a count below zero."""
        value = content.get(key) if isinstance(content, dict) else None
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(
                f"{self.folder / name}: {key!r} is {value!r}, which this version can't read; take "
                "the version that wrote the checkpoint, or name another one"
            )

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.model_validate(self.config["model"])

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file, if the checkpoint has one."""
        found = [self.folder / name for name in TOKENIZER_FILES]
        return next((path for path in found if path.is_file()), None)

    @property
    def run(self) -> Path | None:
        """The folder of the run it is one of; None where it lies by itself."""
        folder = self.folder.resolve().parent
        return folder.parent if folder.name == "checkpoints" else None

    @property
    def end_of_text(self) -> str | None:
        """The token that ended the documents it was trained on, where that was chosen."""
        return self.state.get("data", {}).get("end_of_text_token")

    def refuse_another(self, model: ModelConfig, tokenizer: Path | None) -> None:
        """Raise ValueError where it is of another model, or of another tokenizer of this kind."""
        ours, theirs = model.model_dump(), self.config["model"]
        differ = [key for key in ours if key != "preset" and theirs.get(key) != ours[key]]
        if differ:
            told = (f"{key} is {theirs.get(key)} there and {ours[key]} here" for key in differ)
            raise ValueError(
                f"{self.folder} is of another model: {', '.join(told)}. Resume with the "
                "configuration it was written with (its config.json)"
            )
        kept = self.tokenizer
        if tokenizer is None or kept is None or tokenizer.suffix != kept.suffix:
            return
        if sha256(tokenizer) != sha256(kept):
            raise ValueError(
                f"{self.folder} was trained with another tokenizer than {tokenizer}: their "
                f"contents differ. Set tokenizer.path to {kept}, and prepare the corpus with it"
            )

    @cached_property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """{"model": {name: slice}, "exp_avg": ...}: safetensors slices, nothing read yet."""
        kinds: dict[str, dict[str, Any]] = {MODEL: {}}
        # What else lies in the folder is none of it, such as the parts of another split.
        for name in sorted(folders.read_records(self.folder)):
            if not (part := PART.fullmatch(name)):
                continue
            kind = part["kind"]
            file = safe_open(self.folder / name, framework="pt")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds.setdefault(kind, {}).update(slices)
        return kinds

    def read(self, name: str, kind: str = MODEL) -> Tensor:
        return self.tensors[kind][name][:]

    def check_shapes(self) -> None:
        """Every tensor of the configured model is there, in its shape, before any is made room."""
        found = {name: tuple(part.get_shape()) for name, part in self.tensors[MODEL].items()}
        for name, shape in parameter_shapes(self.model_config).items():
            if found.get(name) != shape:
                raise ValueError(
                    f"{self.folder}: {name} should be {list(shape)} by its {CONFIG}, and is "
                    f"{list(found[name]) if name in found else 'missing'}; name another checkpoint"
                )

    @torch.no_grad()
    def build_model(self) -> GPTNeoX:
        """The whole model in float32, in evaluation; needs a layout of one process a model.

        Raises:
            ValueError: the tensors are not those of the checkpoint's configuration.
        """
        self.check_shapes()  # first: only what is really there is worth its memory
        needed = 4 * sum(map(prod, parameter_shapes(self.model_config).values()))
        refuse_larger(f"the model of {self.folder} in float32", needed, LARGER_MACHINE)
        model = GPTNeoX(self.model_config, seed=0)
        for name, parameter in model.named_parameters():
            value = self.read(name)
            parameter[: len(value)] = value  # the rest are padded vocabulary rows
        return model.eval()


def open_checkpoint(path: str | Path) -> StoredCheckpoint:
    """The checkpoint `path`, or the latest one of the run `path`, every file verified.

    Raises:
        ValueError: no checkpoint there, or a damaged one.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir() or folders.file_list(folder) is None:
        found = folders.current(folder / "checkpoints")
        if not found:
            raise ValueError(
                f"{path}: neither a checkpoint (no {folders.FILES}) nor the folder of a run "
                "with checkpoints"
            )
        folder = found[0]
    if problems := folders.damage(folder):
        raise ValueError(f"{'; '.join(problems)}. Name another checkpoint of the run")
    return StoredCheckpoint(folder)
