"""Write a safetensors file one tensor at a time, hashed on the way, in a thread if wanted.

safetensors' own writer wants all tensors at once; a checkpoint of a sharded model has each of them
whole only for a moment. Reading goes through safetensors itself.
"""

import hashlib
import json
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# Bytes written and hashed at a time: in a processor's cache, and much for a disk.
CHUNK = 1 << 24
# Tensors waiting for the disk while training waits too; more would cost memory and win no time.
WAITING = 2

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
        self._write(values.numpy().data)

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


class WritingThread:
    """Writes files given as {file name: {tensor name: spec}}, in that order, into a folder.

    `put` the tensors in the same order, then `finish`. A failing disk does not interrupt `put`,
    so that this rank goes on taking part in the others' exchanges; `finish` raises it. With
    `copies` the tensors may change once they are put: `put` copies them and never waits.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Mapping[str, TensorSpec]], copies: bool = False
    ):
        self.folder = folder
        self.files = files
        self.copies = copies
        self.queue: queue.Queue[Tensor | None] = queue.Queue(0 if copies else WAITING)
        self.records: dict[str, FileRecord] = {}
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint writer")
        self.thread.start()

    def put(self, tensor: Tensor) -> None:
        self.queue.put(tensor.detach().to("cpu", copy=self.copies))

    def close(self) -> None:
        """No tensor follows."""
        self.queue.put(None)

    def finish(self) -> dict[str, FileRecord]:
        """Records of all files, which are on the disk when this returns."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        assert self.records.keys() == self.files.keys(), "not all tensors were put"
        return self.records

    def _run(self) -> None:
        try:
            self._write()
        except OSError as error:
            self.error = error
            while self.queue.get() is not None:
                pass
        else:
            assert self.queue.get() is None

    def _write(self) -> None:
        for name, specs in self.files.items():
            file = TensorFile(self.folder / name, specs)
            try:
                for tensor_name in specs:
                    tensor = self.queue.get()
                    if tensor is None:
                        self.queue.put(None)  # close() came early: finish() will say so
                        return
                    file.write(tensor_name, tensor)
            except OSError:
                file.abandon()
                raise
            self.records[name] = file.close()
