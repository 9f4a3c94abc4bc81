"""A thread that writes tensors to files, so that hashing and the disk overlap with gathering."""

import queue
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from launch.runtime.disk.tensorfile import FileRecord, TensorFile, TensorSpec

# Tensors waiting for the disk while training waits too; more would cost memory and win no time.
WAITING = 2


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
