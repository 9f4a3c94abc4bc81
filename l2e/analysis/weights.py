"""Sampled entries of a checkpoint's weight matrices, read without loading the checkpoint."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from l2e.files import read_pickled, weight_files
from l2e.hub import refuse_escapes

# Types whose numbers are the weights themselves.
PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fetch_model(source: str, revision: str | None = None) -> Path:
    """A hub id's configuration, tokenizer and weights, on this machine.

    Old revisions have pickled weights alone; they are fetched only where nothing else is there.
    Raises OSError or ValueError if the hub does not have it or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "tokenizer.model", "*.safetensors"]
    folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    if not list(folder.glob("*.safetensors")):
        patterns.append("pytorch_model*.bin")
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    refuse_escapes(folder)
    return folder


class Weights:
    """The tensors of a folder's safetensors files, or of its pytorch_model.bin, memory-mapped.

    Raises ValueError if the folder holds neither, or one that can't be read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._read: dict[str, Callable[[], torch.Tensor]] = {}
        named = weight_files(self.folder)
        tensor_files = [path for path in named if path.suffix == ".safetensors"]
        for path in tensor_files if named else sorted(self.folder.glob("*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: no readable safetensors file: {error}") from error
            # A tensor is a view of the file, of which only the rows that are looked at are read.
            self._read |= {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        if not self._read:
            for path in named or sorted(self.folder.glob("pytorch_model*.bin")):
                tensors = read_pickled(path)
                self._read |= {name: partial(tensors.__getitem__, name) for name in tensors}
        if not self._read:
            raise ValueError(f"{folder}: no *.safetensors or pytorch_model*.bin with weights found")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._read[self._find(name)]().shape)

    def entries(self, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The entries at rows x columns of a matrix, float64 [rows, columns]."""
        matrix = self._read[self._find(name)]()
        if matrix.dtype not in PLAIN:
            raise ValueError(
                f"{self.folder}: {name} is stored as {matrix.dtype}, from which its weights can't "
                "be told; give a copy that is not quantised"
            )
        return matrix[torch.from_numpy(rows)[:, None], torch.from_numpy(columns)].double().numpy()

    def _find(self, name: str) -> str:
        """`name`, or with the prefix that a whole language model puts before its base model's."""
        if name in self._read:
            return name
        for prefix in ("gpt_neox.", "transformer.", "model."):
            if prefix + name in self._read:
                return prefix + name
        raise ValueError(
            f"{self.folder}: no weight named {name}, with or without its model's prefix"
        )
