"""Write a safetensors file one tensor at a time, hashed on the way.

safetensors' own writer wants all tensors at once; a checkpoint of a sharded model has each of them
whole only for a moment. Reading goes through safetensors itself.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# Bytes written and hashed at a time: in a processor's cache, and much for a disk.
CHUNK = 1 << 24

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor will be, known before its values are."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a finished file."""

    bytes: int
    sha256: str


class TensorFile:
    """A safetensors file being written: every tensor of `specs`, in that order, then `close`."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]):
        self.specs = dict(specs)
        self.waiting = list(specs)
        self.digest = hashlib.sha256()
        self.size = 0
        self.file = open(path, "wb")  # noqa: SIM115 - closed by close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, spec in self.specs.items():
            end = start + spec.bytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        spec = self.specs[name]
        assert name == self.waiting.pop(0), f"{name} written out of order"
        assert spec == TensorSpec(tuple(tensor.shape), tensor.dtype), f"{name}: not as announced"
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._write(memoryview(values.numpy()))

    def close(self) -> FileRecord:
        """Finish: everything is on the disk when this returns."""
        assert not self.waiting, f"{self.waiting} never written"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return FileRecord(self.size, self.digest.hexdigest())

    def abandon(self) -> None:
        self.file.close()

    def _write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), CHUNK):
            part = data[start : start + CHUNK]
            self.file.write(part)
            self._begin_to_sync(len(part))
            self.digest.update(part)
            self.size += len(part)

    def _begin_to_sync(self, length: int) -> None:
        """The disk works while the next bytes are hashed; otherwise it would wait for `close`."""
        if length == CHUNK and hasattr(os, "posix_fadvise"):
            self.file.flush()
            os.posix_fadvise(self.file.fileno(), self.size, length, os.POSIX_FADV_DONTNEED)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a whole file at once."""
    file = TensorFile(
        path, {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    )
    for name, tensor in tensors.items():
        file.write(name, tensor)
    return file.close()
