"""The training loop: setup, then one optimizer step after another, validation, checkpoints."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import Config
from data import prefetch
from data.files import write_json
from l2e.backends import choose as choose_kernels
from l2e.config import select_layers
from launch import checkpoint
from launch.engine import hardware
from launch.engine.compiling import uncompiled
from launch.engine.engine import Engine, build
from launch.engine.signals import status_of
from launch.planning.cost import flops_per_token
from launch.training import folder, provenance
from launch.training.agreement import Agreement, find_together, refuse_disagreement
from launch.training.bad_steps import Rollback
from launch.training.changes import told_changes
from launch.training.data import HASHED_SAMPLES, Corpus, open_corpus
from launch.training.feature_monitor import FeatureMonitor
from launch.training.position import Position, position_of
from launch.training.recorder import Recorder
from launch.training.run import Run
from launch.training.schedule import learning_rate


def nothing_left(run: Run, start: Position) -> int:
    """Say that the run is at its end, and change nothing; the exit status."""
    run.say(f"nothing left to do: step {start.step} of {last_step(run.config)} is done")
    mark_finished(run, start.step)
    return 0


def train(run: Run, data: Corpus, start: Position, resume: Path | None) -> int:
    """Train from the checkpoint `resume`, which is at `start`, to the configuration's last step.

    Returns the exit status: 0, or a signal's.
    """
    config = run.config
    check_tasks(config, data)
    engine = build(config)
    describe(run, engine)
    if resume is not None:
        checkpoint.load(engine, resume, data.paths.tokenizer)
        run.say(f"resumed from {resume} at step {start.step}")
        for change in told_changes(resume, config, start.step):
            run.say(change)
    told = data.describe()
    read = {"data": {name: told[name] for name in ("training", "validation", "order_hash")}}
    refuse_disagreement(lambda: read, "every host needs the same files")
    monitor = (
        FeatureMonitor(config, engine, data.paths.tokenizer) if config.monitor.features else None
    )
    if monitor is not None:
        run.say(str(monitor))
    run.say(f"data order: sha256 {told['order_hash']} of the first {HASHED_SAMPLES} samples")
    # All is well: from here on the folder changes.
    folder.begin(run, resume, start.step)
    provenance.write(run, engine, told, resume)
    for _ in range(config.train.nonfinite_limit + 1):
        try:
            return fit(run, engine, data, start, told, monitor)
        except Rollback as bad:
            start, data = roll_back(run, engine, data, start, bad)
            told, reason = data.describe(), bad
    raise ValueError(
        f"{reason}; the run has gone back {config.train.nonfinite_limit} times already "
        "(train.nonfinite_limit). Resume with a lower optimizer.learning_rate or "
        f"l2e.{config.l2e.strength}"
    )


def roll_back(
    run: Run, engine: Engine, data: Corpus, start: Position, bad: Rollback
) -> tuple[Position, Corpus]:
    """The engine as of the newest checkpoint, and the data after the step that went bad.

    Raises:
        ValueError: there is no checkpoint.
    """
    found = find_together(run.folder, "auto")
    if found is None:
        raise ValueError(f"{bad}, and there is no checkpoint to go back to")
    checkpoint.load(engine, found, data.paths.tokenizer)
    position = replace(position_of(found), samples=start.after(bad.step, run.config).samples)
    run.say(
        f"{bad}: back to {found}, and on from there with the data after that step, sample "
        f"{position.samples}"
    )
    folder.begin(run, found, position.step)
    return position, open_corpus(run.config, run.folder, data.paths, position, data.laid_out)


def last_step(config: Config) -> int:
    """The step after which this job is done."""
    return min(config.train.steps, config.train.stop_after or config.train.steps)


def describe(run: Run, engine: Engine) -> None:
    """Say which paths are taken."""
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
    kernels = choose_kernels(
        config.l2e,
        engine.device,
        dtype,
        neurons=config.model.intermediate_size // config.parallel.tensor,
        activation=config.model.activation if config.l2e.site == "post" else None,
    )
    run.say(f"l2e: {kernels}")
    run.say(f"blocks: {engine.compiled}")
    if slow := hardware.emulated(engine.device, config.train.dtype):
        run.say(slow)


def fit(
    run: Run,
    engine: Engine,
    data: Corpus,
    start: Position,
    told: dict[str, Any],
    monitor: FeatureMonitor | None = None,
) -> int:
    """Steps from `start` to the end, or to a signal that asks this job to leave; the exit status.

    told: what checkpoints say of the data.
    """
    config = run.config
    last = last_step(config)
    run.profiler.expect(range(start.step + 1, last + 1))
    on_gpu = engine.device.type == "cuda"
    batches = prefetch(data.training_batches(start, engine.layout), pin=on_gpu)
    request = run.watch.request
    agreement = Agreement(request)
    with (
        closing(Recorder(run, engine, data, start, last)) as recorder,
        checkpoint.Saver(
            engine, run.folder / "checkpoints", data.paths.tokenizer, run.say, run.claim.take
        ) as saver,
    ):

        def flush() -> None:
            try:
                recorder.flush()
            except Rollback:
                request.nothing_to_lose = True
                agreement.close()
                raise

        def save(step: int, must: bool = False) -> None:
            flush()
            run.watch.expect(step, "saving", longer=True)
            with recorder.paused():
                state = {**asdict(start.after(step, config)), "data": told}
                saver.save(state, must=must)

        policies = (config.train.on_nonfinite, config.train.on_spike)
        rolls_back = "rollback" in policies  # which needs somewhere to go
        if start.step == 0 and (rolls_back or 0 in config.checkpoint.steps):
            save(0)
        for step in range(start.step, last):
            done = step + 1
            run.watch.expect(done, "the step", longer=step == start.step)
            measured = done % config.logging.interval == 0 or done in (1, last)
            engine.measure(measured)
            rate = learning_rate(config, step)
            with run.profiler.step(done):
                loss = engine.train_step(batches, rate)
            request.nothing_to_lose = False
            recorder.add(done, loss, rate)
            run.watch.expect(done, "looking at the model", longer=True)
            look_at_model(recorder, run, engine, data, monitor, done, last)
            scored = scores_due(config, done, last)
            if scored:
                # It takes minutes to hours, in which a signal finds the step saved.
                save(done, must=True)
                saver.wait()
                with recorder.paused(), run.watch.nothing_to_lose(done, "scoring"):
                    recorder.annotate({"scores": score_tasks(run, engine, data, done)})
            # The bad news of fp16 are its loss scale's: no reason to look at once.
            bad = engine.dropped_update and config.train.dtype != "fp16"
            if measured or scored or bad:
                flush()
            leaving = agreement.signal()
            ending = done == last or leaving > 0
            if not scored and (ending or save_due(config, done)):
                save(done, must=ending)
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
    return status_of(leaving) if done < last else 0


def mark_finished(run: Run, step: int) -> None:
    """After the last step: batch jobs look for the mark before they requeue."""
    mark = run.folder / folder.FINISHED
    if step >= run.config.train.steps and run.process.is_first and not mark.exists():
        try:
            mark.touch()
        except OSError as error:  # all is saved: the same command finds nothing left to do
            run.say(f"{mark} cannot be written ({error}); a batch job will be queued once more")


def look_at_model(
    recorder: Recorder,
    run: Run,
    engine: Engine,
    data: Corpus,
    monitor: FeatureMonitor | None,
    step: int,
    last: int,
) -> None:
    """Record what is measured of the model after `step`, if it is its turn."""
    wanted = run.config.evaluate
    if step in (1, last) or due(wanted.interval, step):
        with recorder.paused():
            loss = validate(run.config, engine, data)
            recorder.annotate({"validation_loss": loss})
            if step == last and wanted.layer_worth:
                worth = layer_worth(run.config, engine, data, float(loss))
                recorder.annotate({"layer_worth": worth})
    if monitor is not None and (step == last or due(monitor.interval, step)):
        with recorder.paused():
            recorder.annotate(monitor.measure())


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
    from model.gpt_neox import GPTNeoX

    wanted = run.config.evaluate
    assert data.paths.tokenizer is not None, "check_tasks has seen to it"
    assert isinstance(engine.model, GPTNeoX), "configs.checks refuses stages"
    engine.deepspeed.eval()
    model = models.from_model(engine.model, data.paths.tokenizer, engine.device, data.end_of_text())
    asked = harness.HarnessModel(model, group=engine.layout.data_group)
    selection = tasks.select(wanted.tasks, task_folder(run.config))
    with uncompiled():
        report = scores.evaluate(asked, selection, wanted.shots, wanted.task_limit)
    if run.process.is_first:
        run.say(f"scores after step {step}\n{scores.table(report)}")
        path = run.folder / folder.RESULTS / f"evaluate_{wanted.shots}shot_step_{step:07d}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, report | {"step": step})
        except OSError as error:  # hours of scoring, and the scores alone are in the log as well
            run.say(f"{path} cannot be written ({error}): training goes on without it")
    return report["results"]
