"""What a run leaves behind while it trains: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from l2e.threshold import bin_edges

LONGEST_LINE = 2**20  # bytes
BINS_TOGETHER = 8  # the method's 32 bins an octave are finer than a picture can show


def as_json(value: Any) -> Any:
    """`value` for a JSON line: tensors as numbers, non-finite numbers as null."""
    if isinstance(value, dict):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class MetricsFile:
    """`metrics.jsonl`: one line a step, appended to those of the steps before."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: each line is one write, whole or, on a full disk, taken back.
        self.path, self.file = path, path.open("a+b", buffering=0)
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # a last line that a crash left without its end
                self.file.write(b"\n")

    def write(self, record: dict[str, Any]) -> None:
        """Append one step's record and hand it to the operating system.

        Raises:
            OSError: nothing of it was written.
        """
        if not os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
            raise FileNotFoundError(f"{self.path} is another file now")
        line, before = (json.dumps(as_json(record)) + "\n").encode(), self.file.tell()
        written = self.file.write(line)
        if written != len(line):
            self.file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rewrite(self, record: dict[str, Any]) -> None:
        """Put `record` in the place of the last line, if that is of the same step.

        Raises:
            OSError: as `write`; the old line may be gone, and the same call mends it.
        """
        end = self.file.seek(0, os.SEEK_END)
        self.file.seek(max(0, end - LONGEST_LINE))
        *_, last = self.file.read().splitlines(keepends=True) or [b""]
        if last.startswith(json.dumps({"step": record["step"]})[:-1].encode() + b","):
            self.file.truncate(end - len(last))
        self.file.seek(0, os.SEEK_END)
        self.write(record)


class TensorBoard:
    """The same numbers as TensorBoard scalars, and Monosemantic Scale as histograms."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Every number of one step's record, under its own name."""
        step = record["step"]
        for name, value in record.items():
            if name in ("l2e", "monitor"):
                for layer, values in (value or {}).items():
                    for key, number in values.items():
                        self.scalar(f"{name}_{key}/layer_{layer}", number, step)
            elif name == "scores":
                for task, metrics in (value or {}).items():
                    for key, number in metrics.items():
                        self.scalar(f"scores/{task}_{key}", number, step)
            elif name != "step":
                self.scalar(f"train/{name}", value, step)

    def scalar(self, name: str, value: Any, step: int) -> None:
        """One point of one curve; what is missing is left out."""
        value = as_json(value)
        if isinstance(value, int | float):
            self.writer.add_scalar(name, value, step)

    def write_histograms(self, counts_by_layer: dict[str, torch.Tensor], step: int) -> None:
        """log2 of the Monosemantic Scale of each layer's activations, in quarter octaves."""
        edges = bin_edges().log2()
        for layer, counts in counts_by_layer.items():
            counts = counts.view(-1, BINS_TOGETHER).sum(1).double()
            filled = counts.nonzero().flatten()
            if not len(filled):
                continue
            limits = edges[BINS_TOGETHER::BINS_TOGETHER]
            middles = limits - (limits[1] - limits[0]) / 2
            self.writer.add_histogram_raw(
                f"ms_log2/layer_{layer}",
                min=float(middles[filled[0]]),
                max=float(middles[filled[-1]]),
                num=int(counts.sum()),
                sum=float((counts * middles).sum()),
                sum_squares=float((counts * middles**2).sum()),
                bucket_limits=limits[filled[0] : filled[-1] + 1].tolist(),
                bucket_counts=counts[filled[0] : filled[-1] + 1].tolist(),
                global_step=step,
            )

    def close(self) -> None:
        """Write what is still held back."""
        self.writer.close()
