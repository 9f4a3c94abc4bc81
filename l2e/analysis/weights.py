"""Sampled entries of a checkpoint's weight matrices, read without loading the checkpoint."""

import json
from pathlib import Path

import numpy as np
import torch

# safetensors' dtypes as NumPy reads them; bfloat16 is the upper half of a float32.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


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
    return folder


class Weights:
    """The tensors of a folder's safetensors files, or of its pytorch_model.bin, memory-mapped.

    Raises ValueError if the folder holds neither.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._tensors: dict[str, tuple[np.ndarray, bool]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._map_safetensors(path)
        if not self._tensors:
            for path in sorted(self.folder.glob("pytorch_model*.bin")):
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                for name, tensor in tensors.items():
                    is_brain = tensor.dtype == torch.bfloat16
                    raw = tensor.view(torch.uint16) if is_brain else tensor
                    self._tensors[name] = (raw.numpy(), is_brain)
        if not self._tensors:
            raise ValueError(f"{folder}: no *.safetensors or pytorch_model*.bin with weights found")

    def _map_safetensors(self, path: Path) -> None:
        raw = np.memmap(path, mode="r", dtype=np.uint8)
        size = int(raw[:8].view("<u8")[0])
        header = json.loads(bytes(raw[8 : 8 + size]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                continue  # integer buffers hold no weights
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            values = raw[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            self._tensors[name] = (values, entry["dtype"] == "BF16")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[self._find(name)][0].shape

    def entries(self, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The entries at rows x columns of a matrix, float64 [rows, columns]."""
        array, is_brain = self._tensors[self._find(name)]
        found = array[np.ix_(rows, columns)]
        if is_brain:
            found = (found.astype(np.uint32) << 16).view(np.float32)
        return found.astype(np.float64)

    def _find(self, name: str) -> str:
        """`name`, or with the prefix that a whole language model puts before its base model's."""
        if name in self._tensors:
            return name
        for prefix in ("gpt_neox.", "transformer.", "model."):
            if prefix + name in self._tensors:
                return prefix + name
        raise ValueError(
            f"{self.folder}: no weight named {name}, with or without its model's prefix"
        )
