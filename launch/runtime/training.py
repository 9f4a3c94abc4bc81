"""The training loop: setup, then one optimizer step after another, validation, checkpoints."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs import Config
from data import prefetch
from l2e.path import choose as choose_kernels
from launch.runtime import checkpoint, hardware, manifest
from launch.runtime.corpus import HASHED_SAMPLES, Corpus
from launch.runtime.cost import flops_per_token
from launch.runtime.engine import Engine, build
from launch.runtime.logs import MetricsFile, Progress, TensorBoard
from launch.runtime.meters import Profiler, peak_memory
from launch.runtime.monitor import FeatureMonitor
from launch.runtime.processes import Process
from launch.runtime.schedule import learning_rate


@dataclass(frozen=True)
class Run:
    """What the whole loop needs to know: the configuration, the folder, and who speaks."""

    config: Config
    folder: Path
    process: Process
    profiler: Profiler

    def say(self, message: str) -> None:
        """A line of the run's first rank."""
        if self.process.is_first:
            print(message, flush=True)


def train(run: Run, data: Corpus, resume: Path | None) -> None:
    """Train from the checkpoint `resume`, or from the start, to the configuration's last step."""
    config = run.config
    check_tasks(config, data)
    engine = build(config)
    describe(run, engine)
    start = 0
    if resume is not None:
        if resume.parent.name == "checkpoints":  # a run's own; one from elsewhere tells no data
            data.refuse_changes(resume.parent.parent)
        start = checkpoint.load(engine, resume, data.paths.tokenizer)["step"]
        run.say(f"resumed from {resume} at step {start}")
    told = data.describe()
    monitor = FeatureMonitor(config, engine, data.paths.tokenizer) if config.l2e.monitor else None
    if monitor is not None:
        run.say(str(monitor))
    run.say(f"data order: sha256 {told['order_hash']} of the first {HASHED_SAMPLES} samples")
    manifest.write(run.folder, config, engine, told, run.process.launcher)
    fit(run, engine, data, start, monitor)


def describe(run: Run, engine: Engine) -> None:
    """Say which paths are taken; write the resolved configuration."""
    config = run.config
    run.say(
        f"{engine.layout} ({run.process.launcher}), ZeRO-{config.zero_stage}, "
        f"{config.train.dtype} on {hardware.describe(engine.device)}"
    )
    flops = flops_per_token(config.model, config.data.sequence_length)
    run.say(
        f"MFU = tokens/s x {flops / 1e9:.3g} GFLOP a token (6 x matmul parameters + 12 x layers x "
        f"hidden x length) / ({run.process.world_size} x "
        f"{hardware.describe_peak(engine.device, config.train.dtype)})"
    )
    dtype = hardware.TORCH_DTYPES[config.train.dtype]
    kernels = choose_kernels(config.l2e_settings, engine.device, dtype)
    run.say(f"l2e: {kernels}")
    run.say(f"blocks: {engine.compiled}")
    if slow := hardware.emulated(engine.device, config.train.dtype):
        run.say(slow)
    if run.process.is_first:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")


def fit(
    run: Run, engine: Engine, data: Corpus, start: int, monitor: FeatureMonitor | None = None
) -> None:
    """Steps `start` to the end, or to a signal that asks this job to leave."""
    config = run.config
    last = min(config.train.steps, config.train.stop_after or config.train.steps)
    if start >= last:
        run.say(f"nothing left to do: step {start} of {last} is done")
        return
    run.profiler.expect(range(start + 1, last + 1))
    on_gpu = engine.device.type == "cuda"
    batches = prefetch(data.training_batches(start, engine.layout), pin=on_gpu)
    stop = StopSignal()
    recorder = Recorder(run, engine, start, last)
    with checkpoint.Saver(
        engine, run.folder / "checkpoints", data.paths.tokenizer, run.say
    ) as saver:
        if start == 0 and 0 in config.checkpoint.steps:
            saver.save(progress(config, 0))
        for step in range(start, last):
            done = step + 1
            measured = done % config.logging.interval == 0 or done in (1, last)
            engine.measure(measured)
            rate = learning_rate(config, step)
            with run.profiler.step(done):
                loss = engine.train_step(batches, rate)
            recorder.add(done, loss, rate)
            with recorder.paused():
                recorder.annotate(look_at_model(run, engine, data, monitor, done, last))
            if measured:
                recorder.flush()
            leaving = stop.agreed()
            if done == last or leaving or save_due(config, done):
                recorder.flush()
                with recorder.paused():
                    saver.save(progress(config, done))
            if leaving:
                break
    if done < last:
        run.say(
            f"stopped by a signal after step {done}; the same command with --resume auto "
            "goes on from here"
        )
    elif done == config.train.steps and run.process.is_first:
        (run.folder / "finished").touch()  # batch jobs look for it before they requeue
    stop.close()
    recorder.close()


def look_at_model(
    run: Run,
    engine: Engine,
    data: Corpus,
    monitor: FeatureMonitor | None,
    step: int,
    last: int,
) -> dict[str, Any]:
    """What is measured of the model after `step`, if it is its turn."""
    wanted = run.config.evaluate
    found: dict[str, Any] = {}
    if step in (1, last) or due(wanted.interval, step):
        found["validation_loss"] = validate(run.config, engine, data)
    if wanted.tasks and (step == last or due(wanted.task_interval, step)):
        found["scores"] = score_tasks(run, engine, data, step)
    if monitor is not None and (step == last or due(monitor.interval, step)):
        found |= monitor.measure()
    return found


def due(interval: int, step: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) happens at `step`."""
    return interval > 0 and step % interval == 0


def save_due(config: Config, step: int) -> bool:
    """Whether a checkpoint is written after `step`."""
    return due(config.checkpoint.interval, step) or step in config.checkpoint.steps


def progress(config: Config, step: int) -> dict[str, int]:
    """How far a run is after `step` steps."""
    tokens = step * config.train.global_batch_size * config.data.sequence_length
    return {"step": step, "tokens": tokens}


def validate(config: Config, engine: Engine, data: Corpus) -> Tensor:
    """The loss on the same held-out batches each time (nats/token)."""
    batches = data.validation_batches(engine.layout)
    return engine.evaluate(batches, config.evaluate.batches)


def check_tasks(config: Config, data: Corpus) -> None:
    """A task that cannot be scored is told now, not after a day of training."""
    if not config.evaluate.tasks:
        return
    if data.paths.tokenizer is None:
        raise ValueError("evaluate.tasks: the corpus names no tokenizer; set tokenizer.path")
    from launch.runtime.scores.tasks import select

    select(config.evaluate.tasks, task_folder(config))


def task_folder(config: Config) -> Path | None:
    return Path(config.evaluate.task_data) if config.evaluate.task_data else None


def score_tasks(run: Run, engine: Engine, data: Corpus, step: int) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the model as it is; its data-parallel ranks share the items.

    The report, item by item, goes into the run's results, where `compare.py` finds it.
    """
    # The harness takes seconds to import.
    from launch.runtime.scores import evaluation, harness, scored, tasks

    wanted = run.config.evaluate
    assert data.paths.tokenizer is not None, "check_tasks has seen to it"
    engine.deepspeed.eval()
    model = scored.from_model(engine.model, data.paths.tokenizer, engine.device)
    asked = harness.HarnessModel(model, group=engine.layout.data_group)
    selection = tasks.select(wanted.tasks, task_folder(run.config))
    report = evaluation.evaluate(asked, selection, wanted.shots, wanted.task_limit)
    if run.process.is_first:
        folder = run.folder / "results"
        folder.mkdir(exist_ok=True)
        name = f"evaluate_{wanted.shots}shot_step_{step:07d}.json"
        (folder / name).write_text(json.dumps(report | {"step": step}, indent=1) + "\n")
        print(f"scores after step {step}\n{evaluation.table(report)}", flush=True)
    return report["results"]


class StopSignal:
    """SIGTERM and SIGUSR1 (a batch system's warnings), agreed on by all ranks.

    A signal reaches the ranks at different steps. Each step starts a tiny all-reduce on the host
    that is read one step later, so nobody waits and everybody leaves after the same step.
    """

    def __init__(self) -> None:
        self.received = torch.zeros(1, dtype=torch.int32)
        self.pending: tuple[Any, Tensor] | None = None
        self.group = dist.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        """The signal handler: only remembers."""
        self.received.fill_(1)

    def agreed(self) -> bool:
        """Whether any rank had been signalled by the end of the previous step."""
        answer = False
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            answer = bool(flag.item())
        flag = self.received.clone()
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = (work, flag)
        return answer

    def close(self) -> None:
        """Wait for the last exchange, so that no rank ends with one under way."""
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None


class Recorder:
    """Collects a step's numbers as tensors and fetches them from the device every few steps."""

    def __init__(self, run: Run, engine: Engine, start: int, last: int) -> None:
        config = run.config
        self.run, self.engine = run, engine
        self.step_tokens = config.train.global_batch_size * config.data.sequence_length
        self.step_flops = self.step_tokens * flops_per_token(
            config.model, config.data.sequence_length
        )
        self.peak = hardware.peak_flops(engine.device, config.train.dtype) * run.process.world_size
        self.pending: list[dict[str, Any]] = []
        self.since = time.monotonic()
        self.board: TensorBoard | None = None
        if run.process.is_first:
            self.file = MetricsFile(run.folder / "metrics.jsonl", start)
            self.progress = Progress(last, start)
            if config.logging.tensorboard:
                self.board = TensorBoard(run.folder / "tensorboard", start)

    def add(self, step: int, loss: Tensor, rate: float) -> None:
        """Remember one step; nothing is fetched from the device."""
        self.pending.append(
            {
                "step": step,
                "tokens": step * self.step_tokens,
                "lm_loss": loss.detach(),
                "ms_loss": self.engine.ms_loss(),
                "grad_norm": self.engine.gradient_norm(),
                "lr": rate,
                "loss_scale": self.engine.loss_scale,
            }
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        begin = time.monotonic()
        yield
        self.since += time.monotonic() - begin

    def annotate(self, values: dict[str, Any]) -> None:
        """What was measured after the newest step, beside its own numbers."""
        self.pending[-1] |= values

    def flush(self) -> None:
        """Fetch, check and write what has been remembered."""
        if not self.pending:
            return
        records, self.pending = self.pending, []
        self.add_up_stages(records)
        self.fetch(records)
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
        self.write(records)
        if self.board is not None:
            self.board.write_histograms(histograms, records[-1]["step"])
        self.check(records)

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
            self.file.write(record)
            if self.board is not None:
                self.board.write(record)
        newest = records[-1]
        shown = {
            "loss": f"{newest['lm_loss']:.4f}",
            "tokens/s": f"{newest['tokens_per_second']:,.0f}",
            "MFU": f"{newest['mfu']:.1%}",
        }
        validations = [r for r in records if "validation_loss" in r]
        if validations:
            shown["validation"] = f"{validations[-1]['validation_loss']:.4f}"
        self.progress.advance(newest["step"], shown)

    def check(self, records: list[dict[str, Any]]) -> None:
        """Stop at a loss that is no number: every later step would be lost."""
        for record in records:
            if not abs(record["lm_loss"]) < float("inf"):
                raise ValueError(
                    f"the loss is {record['lm_loss']} at step {record['step']}; resume from the "
                    "last checkpoint with a lower optimizer.learning_rate or l2e.weight"
                )

    def close(self) -> None:
        """End the progress line."""
        if self.run.process.is_first:
            self.progress.close()
        if self.board is not None:
            self.board.close()
