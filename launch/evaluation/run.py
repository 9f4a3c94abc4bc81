"""What `launch/evaluate.py` does: find the models, score each, print and write the scores."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from launch import cli
from launch.checkpoint import folders
from launch.checkpoint.stored import STATE, StoredCheckpoint, open_checkpoint
from launch.engine.groups import single_process
from launch.engine.hardware import TORCH_DTYPES
from launch.evaluation import models, scores
from launch.evaluation.harness import HarnessModel, Scored
from launch.evaluation.tasks import Selection, select

# Most tokens of one forward pass, by kind of device.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


def score_models(options: argparse.Namespace) -> None:
    """Score every model that `evaluate.py`'s options name: print its table, write its JSON."""
    models = find_models(options.checkpoint, options.steps)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for step, _ in models:  # a mistake should not wait for the scores
        published(options, step)
        cli.refuse_unwritable(output_file(options, step, several=len(models) > 1))
    with single_process():
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        for step, source in models:
            # Tasks keep what a model answered, so every model gets its own.
            selection = select(options.tasks.split(","), options.task_data)
            model = load(source, options)
            output = output_file(options, step, several=len(models) > 1)
            score(model, selection, options, group, step, output)


def find_models(checkpoint: str, steps: str) -> list[tuple[int | None, str]]:
    """(step, folder or hub id) of every model to score, in the order of their steps."""
    folder = Path(checkpoint)
    if (folder / STATE).is_file():
        return [(StoredCheckpoint(folder).state["step"], checkpoint)]
    found = folders.current(folder / "checkpoints")
    if not found:
        if steps != "latest":
            raise ValueError(f"--steps {steps}: {folder / 'checkpoints'} holds no checkpoints")
        return [(None, checkpoint)]
    by_step = {folders.step_of(path): str(path) for path in reversed(found)}
    if steps == "all":
        return list(by_step.items())
    if steps == "latest":
        return [max(by_step.items())]
    try:
        wanted = [int(step) for step in steps.split(",")]
    except ValueError:
        raise ValueError(
            f"--steps {steps}: give numbers as in 100,200, or all, or latest"
        ) from None
    if missing := sorted(set(wanted) - by_step.keys()):
        raise ValueError(
            f"--steps: no checkpoint of step {missing[0]}; there are "
            f"{', '.join(map(str, by_step))} in {folder / 'checkpoints'}"
        )
    return [(step, by_step[step]) for step in wanted]


def load(source: str, options: argparse.Namespace) -> Scored:
    dtype, device = TORCH_DTYPES[options.dtype], torch.device(options.device)
    if folders.file_list(Path(source)) is not None:
        return models.from_checkpoint(open_checkpoint(source), dtype, device)
    return models.from_huggingface(source, dtype, device)


def score(
    model: Scored,
    selection: Selection,
    options: argparse.Namespace,
    group: dist.ProcessGroup | None,
    step: int | None,
    output: Path,
) -> None:
    batch_tokens = options.batch_tokens or BATCH_TOKENS[model.device.type]
    harness = HarnessModel(model, batch_tokens, group)
    report = scores.evaluate(harness, selection, options.shots, options.limit)
    if harness.group_rank != 0:
        return
    reference = published(options, step)
    report |= {"step": step, "checkpoint": options.checkpoint, "reference": reference}
    print(scores.table(report, reference))  # first: they shall not be lost with the file
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'step ' + str(step) if step is not None else options.checkpoint}: {output}")


def published(
    options: argparse.Namespace, step: int | None
) -> tuple[str, dict[str, dict[str, float]]] | None:
    if options.reference is None:
        return None
    nearest, published = scores.official(options.reference, options.shots, step)
    return f"{options.reference} step {nearest}", published


def output_file(options: argparse.Namespace, step: int | None, several: bool) -> Path:
    """Where the JSON goes; of several steps each has its own file."""
    shots = f"{options.shots}shot"
    name = f"evaluate_{shots}" if step is None else f"evaluate_{shots}_step_{step:07d}"
    if options.output is None:
        run = Path(options.checkpoint)
        run = run.parent.parent if run.parent.name == "checkpoints" else run
        return (run if run.is_dir() else Path()) / "results" / f"{name}.json"
    output = Path(options.output)
    return output.with_stem(f"{output.stem}_step_{step:07d}") if several else output
