"""A step's numbers, collected on the device and fetched every few steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import methodcaller
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.show import describe_samples
from l2e.progress import Progress
from launch.engine import hardware
from launch.engine.engine import Engine
from launch.engine.profiling import peak_memory
from launch.planning.cost import flops_per_token
from launch.training.bad_steps import BadSteps
from launch.training.data import Corpus
from launch.training.folder import METRICS
from launch.training.logs import MetricsFile, TensorBoard
from launch.training.position import Position
from launch.training.run import Run
from launch.training.spikes import Spikes
from launch.training.unfailing import Unfailing


class Recorder:
    """Collects a step's numbers as tensors and fetches them from the device every few steps."""

    def __init__(self, run: Run, engine: Engine, data: Corpus, start: Position, last: int) -> None:
        config = run.config
        self.run, self.engine, self.start = run, engine, start
        self.step_tokens = config.train.global_batch_size * config.data.sequence_length
        self.step_flops = self.step_tokens * flops_per_token(
            config.model, config.data.sequence_length
        )
        self.peak = hardware.peak_flops(engine.device, config.train.dtype) * run.process.world_size
        self.pending: list[dict[str, Any]] = []
        self.newest: dict[str, Any] = {}  # the record written last
        self.since = time.monotonic()
        self.board: Unfailing[TensorBoard] | None = None
        self.bad_steps = BadSteps(config, run.say)
        self.spikes = Spikes(config, self.describe_batch, run.say)
        self.data = data
        if run.process.is_first:
            self.file = Unfailing(METRICS, self.open_metrics, run.say)
            self.progress = Progress(
                total=last, initial=start.step, desc="training", unit="steps", delay=0
            )
            if config.logging.tensorboard:
                board = partial(TensorBoard, run.folder / "tensorboard", start.step)
                self.board = Unfailing("tensorboard", board, run.say)

    def open_metrics(self) -> MetricsFile:
        self.run.claim.keep()  # or the lines of two runs would mix
        return MetricsFile(self.run.folder / METRICS)

    def describe_batch(self, step: int) -> str:
        """The samples of a step, and the shares of the subsets that they are from."""
        first = self.start.after(step - 1, self.run.config).samples
        return describe_samples(
            self.data.training, range(first, first + self.run.config.train.global_batch_size)
        )

    def add(self, step: int, loss: Tensor, rate: float) -> None:
        """Remember one step; nothing is fetched from the device."""
        self.pending.append(
            {
                "step": step,
                "tokens": self.start.after(step, self.run.config).tokens,
                "lm_loss": loss.detach(),
                "ms_loss": self.engine.ms_loss(),
                "grad_norm": self.engine.gradient_norm(),
                "lr": rate,
                "loss_scale": self.engine.loss_scale,
            }
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training time.

        The device is waited for on entering, for steps that are still under way, and on leaving.
        """
        self.engine.wait()
        begin = time.monotonic()
        yield
        self.engine.wait()
        self.since += time.monotonic() - begin

    def annotate(self, values: dict[str, Any]) -> None:
        """What was measured after the newest step, beside its own numbers.

        They may be written already, as before a save.
        """
        if self.pending:
            self.pending[-1] |= values
            return
        self.newest |= values
        if self.run.process.is_first:
            self.file.write(methodcaller("rewrite", self.newest))
            if self.board is not None:
                self.board.write(methodcaller("write", {"step": self.newest["step"]} | values))

    def flush(self) -> None:
        """Fetch, check and write what has been remembered."""
        if not self.pending:
            return
        records, self.pending = self.pending, []
        self.add_up_stages(records)
        self.fetch(records)
        bad_layers = self.engine.l2e_bad_steps()  # first: the metrics would raise of them
        l2e, histograms = self.engine.l2e_metrics(), self.engine.l2e_histograms()
        now = time.monotonic()
        seconds = (now - self.since) / len(records)
        parts = {name: spent / len(records) for name, spent in self.engine.stopwatch.take().items()}
        self.since = now
        for record in records:
            record["loss"] = record["lm_loss"] + record["ms_loss"]
            record["tokens_per_second"] = self.step_tokens / seconds
            record["mfu"] = self.step_flops / seconds / self.peak
            record["step_seconds"] = seconds
            record["seconds"] = parts
            record["peak_memory_bytes"] = peak_memory(self.engine.device)
            record["l2e"] = None
        records[-1]["l2e"] = l2e
        self.newest = records[-1]
        self.bad_steps.count(records)
        self.spikes.count(records)
        self.write(records)
        if self.board is not None:
            step = records[-1]["step"]
            self.board.write(lambda board: board.write_histograms(histograms, step))
        self.bad_steps.judge(records, bad_layers)
        self.spikes.judge()

    def add_up_stages(self, records: list[dict[str, Any]]) -> None:
        """L_MS arises in every pipeline stage; the run's is their sum."""
        layout = self.engine.layout
        if layout.pipeline_size > 1:
            losses = torch.stack([record["ms_loss"] for record in records])
            dist.all_reduce(losses, group=layout.pipeline_group)
            for record, loss in zip(records, losses, strict=True):
                record["ms_loss"] = loss

    def fetch(self, records: list[dict[str, Any]]) -> None:
        """Turn the records' tensors into numbers, by one copy from the device."""
        places = [(r, k) for r in records for k, v in r.items() if isinstance(v, Tensor)]
        values = torch.stack([record[key].float().reshape(()) for record, key in places])
        for (record, key), value in zip(places, values.tolist(), strict=True):
            record[key] = value

    def write(self, records: list[dict[str, Any]]) -> None:
        """Hand the records to the files and the newest to the progress line."""
        if not self.run.process.is_first:
            return
        for record in records:
            self.file.write(methodcaller("write", record))
            if self.board is not None:
                self.board.write(methodcaller("write", record))
        newest = records[-1]
        shown = {
            "loss": f"{newest['lm_loss']:.4f}",
            "tokens/s": f"{newest['tokens_per_second']:,.0f}",
            "MFU": f"{newest['mfu']:.1%}",
        }
        validations = [r for r in records if "validation_loss" in r]
        if validations:
            shown["validation"] = f"{validations[-1]['validation_loss']:.4f}"
        self.progress.set_postfix(shown, refresh=False)
        self.progress.advance_to(newest["step"])

    def close(self) -> None:
        """End the progress line, and write what the files have still to learn."""
        if self.run.process.is_first:
            self.progress.close()
            self.file.close()
        if self.board is not None:
            self.board.write(methodcaller("close"))
            self.board.close()
