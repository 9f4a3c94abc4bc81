"""The training loop: setup, then one optimizer step after another, validation, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import Config
from data import prefetch
from l2e.backends import choose as choose_kernels
from l2e.config import select_layers
from launch import checkpoint
from launch.engine import hardware
from launch.engine.engine import Engine, build
from launch.engine.signals import status_of
from launch.planning.cost import flops_per_token
from launch.training import provenance
from launch.training.agreement import Agreement
from launch.training.data import HASHED_SAMPLES, Corpus
from launch.training.feature_monitor import FeatureMonitor
from launch.training.recorder import Recorder
from launch.training.run import Run
from launch.training.schedule import learning_rate


def train(run: Run, data: Corpus, resume: Path | None) -> int:
    """Train from the checkpoint `resume`, or from the start, to the configuration's last step.

    Returns the exit status: 0, or a signal's.
    """
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
    monitor = (
        FeatureMonitor(config, engine, data.paths.tokenizer) if config.monitor.features else None
    )
    if monitor is not None:
        run.say(str(monitor))
    run.say(f"data order: sha256 {told['order_hash']} of the first {HASHED_SAMPLES} samples")
    provenance.write(run.folder, config, engine, told, run.process.launcher)
    return fit(run, engine, data, start, monitor)


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
    kernels = choose_kernels(config.l2e, engine.device, dtype)
    run.say(f"l2e: {kernels}")
    run.say(f"blocks: {engine.compiled}")
    if slow := hardware.emulated(engine.device, config.train.dtype):
        run.say(slow)
    if run.process.is_first:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")


def fit(
    run: Run, engine: Engine, data: Corpus, start: int, monitor: FeatureMonitor | None = None
) -> int:
    """Steps `start` to the end, or to a signal that asks this job to leave; the exit status."""
    config = run.config
    last = min(config.train.steps, config.train.stop_after or config.train.steps)
    if start >= last:
        run.say(f"nothing left to do: step {start} of {last} is done")
        mark_finished(run, start)
        return 0
    run.profiler.expect(range(start + 1, last + 1))
    on_gpu = engine.device.type == "cuda"
    batches = prefetch(data.training_batches(start, engine.layout), pin=on_gpu)
    request = run.watch.request
    agreement = Agreement(request)
    recorder = Recorder(run, engine, start, last)
    with checkpoint.Saver(
        engine, run.folder / "checkpoints", data.paths.tokenizer, run.say
    ) as saver:

        def save(step: int) -> None:
            recorder.flush()
            run.watch.expect(step, "saving", longer=True)
            with recorder.paused():
                saver.save(progress(config, step))

        if start == 0 and 0 in config.checkpoint.steps:
            save(0)
        for step in range(start, last):
            done = step + 1
            run.watch.expect(done, "the step", longer=step == start)
            measured = done % config.logging.interval == 0 or done in (1, last)
            engine.measure(measured)
            rate = learning_rate(config, step)
            with run.profiler.step(done):
                loss = engine.train_step(batches, rate)
            request.nothing_to_lose = False
            recorder.add(done, loss, rate)
            run.watch.expect(done, "looking at the model", longer=True)
            with recorder.paused():
                recorder.annotate(look_at_model(run, engine, data, monitor, done, last))
            scored = scores_due(config, done, last)
            if scored:
                # It takes minutes to hours, in which a signal finds the step saved.
                save(done)
                saver.wait()
                with recorder.paused(), run.watch.nothing_to_lose(done, "scoring"):
                    recorder.annotate({"scores": score_tasks(run, engine, data, done)})
            if measured or scored:
                recorder.flush()
            leaving = agreement.signal()
            if not scored and (done == last or leaving or save_due(config, done)):
                save(done)
            if leaving:
                break
    request.nothing_to_lose = True
    if done < last:
        run.say(
            f"stopped by a signal after step {done}; the same command with --resume auto "
            "goes on from here"
        )
    mark_finished(run, done)
    agreement.close()
    recorder.close()
    return status_of(leaving) if done < last else 0


def mark_finished(run: Run, step: int) -> None:
    """After the last step: batch jobs look for the mark before they requeue."""
    if step >= run.config.train.steps and run.process.is_first:
        (run.folder / "finished").touch()


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
        found["validation_loss"] = loss = validate(run.config, engine, data)
        if step == last and wanted.layer_worth:
            found["layer_worth"] = layer_worth(run.config, engine, data, float(loss))
    if monitor is not None and (step == last or due(monitor.interval, step)):
        found |= monitor.measure()
    return found


def scores_due(config: Config, step: int, last: int) -> bool:
    """Whether downstream tasks are scored after `step`."""
    wanted = config.evaluate
    return bool(wanted.tasks) and (step == last or due(wanted.task_interval, step))


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


def layer_worth(config: Config, engine: Engine, data: Corpus, loss: float) -> dict[str, float]:
    """By how much the validation `loss` rises without the MLPs of inhibited blocks (nats/token).

    {block number: without its MLP alone, ..., "together": without all of them}. A layer that
    costs nothing to remove was switched off, whatever its activations look like.
    """
    blocks = select_layers(config.l2e.layers, config.model.num_layers)
    asked = {str(block): {block} for block in blocks} | {"together": set(blocks)}
    found = {}
    for name, removed in asked.items():
        with engine.without_mlps(removed):
            found[name] = float(validate(config, engine, data)) - loss
    return found


def check_tasks(config: Config, data: Corpus) -> None:
    """A task that cannot be scored is told now, not after a day of training."""
    if not config.evaluate.tasks:
        return
    if data.paths.tokenizer is None:
        raise ValueError("evaluate.tasks: the corpus names no tokenizer; set tokenizer.path")
    from launch.evaluation.tasks import select

    select(config.evaluate.tasks, task_folder(config))


def task_folder(config: Config) -> Path | None:
    return Path(config.evaluate.task_data) if config.evaluate.task_data else None


def score_tasks(run: Run, engine: Engine, data: Corpus, step: int) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of the model as it is; its data-parallel ranks share the items.

    The report, item by item, goes into the run's results, where `compare.py` finds it.
    """
    # The harness takes seconds to import.
    from launch.evaluation import harness, models, scores, tasks

    wanted = run.config.evaluate
    assert data.paths.tokenizer is not None, "check_tasks has seen to it"
    engine.deepspeed.eval()
    model = models.from_model(engine.model, data.paths.tokenizer, engine.device)
    asked = harness.HarnessModel(model, group=engine.layout.data_group)
    selection = tasks.select(wanted.tasks, task_folder(run.config))
    report = scores.evaluate(asked, selection, wanted.shots, wanted.task_limit)
    if run.process.is_first:
        folder = run.folder / "results"
        folder.mkdir(exist_ok=True)
        name = f"evaluate_{wanted.shots}shot_step_{step:07d}.json"
        (folder / name).write_text(json.dumps(report | {"step": step}, indent=1) + "\n")
        run.say(f"scores after step {step}\n{scores.table(report)}")
    return report["results"]
