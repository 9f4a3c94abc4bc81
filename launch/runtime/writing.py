"""A thread that writes tensors to files, so that hashing and the disk overlap with gathering."""

import queue
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from launch.runtime.tensorfile import FileRecord, TensorFile, TensorSpec

# Tensors waiting for the disk; more would cost memory and win no time.
WAITING = 2


class WritingThread:
    """Writes files given as {file name: {tensor name: spec}}, in that order, into a folder.

    `put` the tensors in the same order, then `finish`. A failing disk does not interrupt `put`,
    so that this rank goes on taking part in the others' exchanges; `finish` raises it.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, TensorSpec]]):
        self.folder = folder
        self.files = files
        self.queue: queue.Queue[Tensor | None] = queue.Queue(WAITING)
        self.records: dict[str, FileRecord] = {}
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint writer")
        self.thread.start()

    def put(self, tensor: Tensor) -> None:
        self.queue.put(tensor.detach().cpu())

    def finish(self) -> dict[str, FileRecord]:
        """Records of all files, which are on the disk when this returns."""
        self.queue.put(None)
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
                        self.queue.put(None)  # finish() was called early: it will say so
                        return
                    file.write(tensor_name, tensor)
            except OSError:
                file.abandon()
                raise
            self.records[name] = file.close()
