"""The rules that need more than one key: batch sizes, layouts, precisions, files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data import check as data_check
from data import check_one_tokenizer, check_tokenizer
from l2e import select_layers
from l2e.hub import is_hub
from l2e.problems import Problem

if TYPE_CHECKING:
    from configs.schema import Config

BUILTIN = "builtin"  # as data.path: the corpus that needs no download
FILLED_IN = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer.type",
    "scheduler": "schedule.type",
    "bf16": "train.dtype",
}


def cross_check(config: Config, processes: int | None = None) -> Iterator[Problem]:
    """Every broken rule of `config` for a run of `processes` ranks."""
    yield from check_model(config)
    yield from check_deepspeed(config)
    yield from check_tasks(config)
    yield from check_monitor(config)
    yield from check_layout(config, processes or config.parallel.processes or 1)
    yield from check_compile(config)
    yield from check_data(config)


def check_compile(config: Config) -> Iterator[Problem]:
    """Blocks that are to be compiled can be."""
    if config.train.compile is True:
        for reason, fix in compile_obstacles(config):
            yield Problem("train.compile", True, reason, f"set train.compile false or {fix}")


def compile_obstacles(config: Config) -> Iterator[tuple[str, str]]:
    """What splits a block's graph in parts, and what would mend it."""
    for name, size in (("tensor", config.parallel.tensor), ("pipeline", config.parallel.pipeline)):
        if size > 1:
            reason = f"not with parallel.{name} = {size}, whose exchanges split a block's graph"
            yield reason, f"parallel.{name} 1"
    if config.zero_stage > 2:
        reason = f"not with ZeRO-{config.zero_stage}, which gathers weights between a block's parts"
        yield reason, "deepspeed.zero_optimization.stage at most 2"


def check_model(config: Config) -> Iterator[Problem]:
    """Sizes that have to divide, and blocks that have to exist."""
    model, tensor, pipeline = config.model, config.parallel.tensor, config.parallel.pipeline
    heads = model.num_attention_heads
    if heads % tensor:
        yield Problem(
            "parallel.tensor",
            tensor,
            f"does not divide model.num_attention_heads = {heads}",
            f"choose one of {divisors(heads)}",
        )
    if pipeline > model.num_layers:
        yield Problem(
            "parallel.pipeline",
            pipeline,
            f"more stages than the {model.num_layers} blocks of the model",
            f"choose at most {model.num_layers}",
        )
    if config.data.sequence_length > model.max_position_embeddings:
        yield Problem(
            "data.sequence_length",
            config.data.sequence_length,
            f"longer than model.max_position_embeddings = {model.max_position_embeddings}",
            "shorten it or raise model.max_position_embeddings",
        )
    try:
        select_layers(config.l2e.layers, model.num_layers)
    except Problem as problem:
        yield problem.within("l2e")


def check_deepspeed(config: Config) -> Iterator[Problem]:
    """ZeRO stages that DeepSpeed refuses, or gets wrong without a word."""
    name = "deepspeed.zero_optimization.stage"
    for filled, source in FILLED_IN.items():
        if filled in config.deepspeed:
            value = config.deepspeed[filled]
            yield Problem(f"deepspeed.{filled}", value, "filled in by the trainer", f"set {source}")
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        fix = 'write {"stage": 1}'
        yield Problem("deepspeed.zero_optimization", zero, "not a section", fix)
        return
    stage = zero.get("stage", 1)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield Problem(name, stage, "no ZeRO stage", "choose 0, 1, 2 or 3")
        return
    if config.parallel.pipeline > 1 and stage != 1:
        reason = (
            "pipeline parallelism works with ZeRO-1 alone (DeepSpeed refuses 2 and 3; at 0 its "
            "gradient norm leaves out the later stages' norms and biases)"
        )
        yield Problem(name, stage, reason, "set it to 1, or parallel.pipeline to 1")
    elif config.train.dtype == "fp16" and stage == 0:
        reason = "fp16 at ZeRO-0 unscales gradients of a loss that was never scaled"
        yield Problem(name, stage, reason, "set it to 1, or train.dtype to bf16")
    elif config.train.dtype == "bf16" and stage == 0:
        reason = "at ZeRO-0 DeepSpeed cannot add up bf16 gradients in fp32"
        yield Problem(name, stage, reason, "set it to 1, or train.dtype to fp32")


def check_tasks(config: Config) -> Iterator[Problem]:
    """Tasks are scored on the model in training, which each process must be able to run alone."""
    if not config.evaluate.tasks:
        return
    reason = None
    if config.parallel.pipeline > 1 or config.parallel.sequence:
        reason = "scores during training need whole layers: no pipeline or sequence parallelism"
    elif config.deepspeed.get("zero_optimization", {}).get("stage", 1) == 3:
        reason = "scores during training need whole parameters: ZeRO-2 or lower"
    if reason:
        fix = "set it to [] and score the checkpoints by launch/evaluate.py --steps all"
        yield Problem("evaluate.tasks", config.evaluate.tasks, reason, fix)


def check_monitor(config: Config) -> Iterator[Problem]:
    """The feature passages that are measured during training."""
    path = config.monitor.features
    if path is not None and not Path(path).is_file():
        fix = "give a file from launch/prepare.py features, or null"
        yield Problem("monitor.features", path, "no such file", fix)


def check_layout(config: Config, processes: int) -> Iterator[Problem]:
    """Processes and batch sizes that have to multiply out."""
    parallel, train = config.parallel, config.train
    if parallel.sequence and parallel.tensor == 1:
        reason = "sequence parallelism splits what tensor parallelism leaves whole"
        yield Problem("parallel.sequence", True, reason, "set it to false, or parallel.tensor > 1")
    model_parallel = parallel.tensor * parallel.pipeline
    if processes % model_parallel:
        reason = (
            f"{parallel.tensor} tensor x {parallel.pipeline} pipeline ranks hold one model, and "
            f"{processes} processes are no multiple of {model_parallel}"
        )
        fix = f"start {max(1, processes // model_parallel) * model_parallel} processes"
        yield Problem("processes", processes, reason, f"{fix}, or change parallel.*")
        return
    data = processes // model_parallel
    at_once = train.micro_batch_size * data
    if train.global_batch_size % at_once:
        reason = (
            f"not a multiple of train.micro_batch_size = {train.micro_batch_size} "
            f"x {data} data-parallel ranks = {at_once}"
        )
        lower = train.global_batch_size // at_once * at_once
        near = " or ".join(str(size) for size in (lower, lower + at_once) if size)
        fix = f"choose {near}, another micro-batch, or fewer processes"
        yield Problem("train.global_batch_size", train.global_batch_size, reason, fix)


def check_data(config: Config) -> Iterator[Problem]:
    """A corpus that is there, whole, and of the model's tokenizer."""
    data = config.data
    if data.path is None:
        fix = "give the prefix that launch/prepare.py wrote, or builtin"
        yield Problem("data.path", None, "no corpus", fix)
        return
    if data.path == BUILTIN:
        return  # prepared at the start
    train = config.train
    # What is on the hub is checked once it has been fetched, by `launch.training.data.fetch`.
    tokenizer = None if is_hub(config.tokenizer.path) else config.tokenizer.path
    sets = {"data.path": data.path, "data.validation_path": data.validation_path}
    sets = {key: path for key, path in sets.items() if not is_hub(path)}
    if is_hub(data.path):
        for found in check_tokenizer(tokenizer, config.model.vocab_size)[1]:
            yield renamed(found, "tokenizer.path")
    held_out = data.validation_fraction if data.validation_path is None else None
    validation_samples = config.evaluate.batches * train.global_batch_size
    for part, path, samples, split in (
        ("path", data.path, train.steps * train.global_batch_size, held_out),
        ("validation_path", data.validation_path, validation_samples, None),
    ):
        if path is not None and not is_hub(path):
            for found in data_check(
                path,
                data.sequence_length,
                samples,
                order=data.order if part == "path" else "neox",
                split=split,
                validation_samples=validation_samples,
                tokenizer=tokenizer,
                vocab_size=config.model.vocab_size,
            ):
                yield renamed(found, f"data.{part}")
    yield from check_one_tokenizer(sets)


def renamed(found: Problem, key: str) -> Problem:
    """A problem of a file as one of the configuration's key that named it."""
    key = "tokenizer.path" if found.key == "tokenizer" else key
    return Problem(found.key if "." in found.key else key, found.value, found.reason, found.fix)


def divisors(number: int) -> str:
    """The divisors of `number`, as a list to choose from."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
