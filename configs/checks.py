"""The rules that need more than one key: batch sizes, layouts, precisions, files."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from configs.deepspeed_keys import KNOWN, check_keys
from data import check as data_check
from data import check_one_tokenizer, check_tokenizer, manifest
from data.index import bin_path
from l2e import select_layers
from l2e.files import OPEN_TO_ALL, strangers_folder
from l2e.hub import is_hub
from l2e.problems import Problem
from model.config import PRESETS

if TYPE_CHECKING:
    from configs.schema import Config

LEAST_RATE = 1e-10  # of a weight of 0.001, about what float32 can tell
BUILTIN = "builtin"  # as data.path: the corpus that needs no download
FILLED_IN = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer.type",
    "scheduler": "schedule.type",
    "bf16": "train.dtype",
    "bfloat16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "elasticity": "train.global_batch_size",
    "steps_per_print": "logging.interval",
}


def cross_check(
    config: Config, processes: int | None = None, dealt: bool = True
) -> Iterator[Problem]:
    """Every broken rule of `config` for a run of `processes` ranks; see `configs.load`."""
    yield from check_model(config)
    broken = list(check_deepspeed(config))
    yield from broken
    if broken:  # the other rules are held against what would be without it
        config = config.model_copy(update={"deepspeed": {}})
    yield from check_stage(config)
    yield from check_update(config)
    yield from check_tasks(config)
    yield from check_monitor(config)
    if dealt:
        yield from check_dealing(config, processes or config.parallel.processes or 1)
    yield from check_compile(config)
    yield from check_data(config)
    yield from check_cache(config)


def warnings(config: Config) -> Iterator[str]:
    """What can be meant so, and seldom is."""
    train, schedule, model = config.train, config.schedule, config.model
    shape = PRESETS[model.preset] if model.preset else {}
    other = {key: getattr(model, key) for key in shape if getattr(model, key) != shape[key]}
    if other:
        told = ", ".join(f"{key} = {value}" for key, value in other.items())
        yield f"model.preset = {model.preset!r}: the keys beside it override it, {told}"
    if schedule.warmup_steps > train.steps:
        yield (
            f"schedule.warmup_steps = {schedule.warmup_steps}: longer than the run of "
            f"{train.steps} steps, which never reaches optimizer.learning_rate"
        )
    if config.l2e.method != "none" and config.l2e.late_start_step >= train.steps:
        yield (
            f"l2e.late_start_step = {config.l2e.late_start_step}: the run of {train.steps} steps "
            "ends before anything is inhibited"
        )
    if outside := [step for step in config.checkpoint.steps if step > train.steps]:
        yield f"checkpoint.steps: {outside} are past the run's last step, {train.steps}"
    if train.stop_after is not None and train.stop_after > train.steps:
        yield f"train.stop_after = {train.stop_after}: past the run's last step, {train.steps}"
    if config.data.path == BUILTIN and config.tokenizer.path is not None:
        yield (
            f"tokenizer.path = {config.tokenizer.path!r}: not used, since data.path builtin has "
            f"one of its own trained, of tokenizer.vocab_size = {config.tokenizer.vocab_size} ids"
        )
    if config.data.cache_dir is not None:
        place = nearest_folder(Path(config.data.cache_dir))
        if place.stat().st_uid not in (os.getuid(), 0):
            yield f"data.cache_dir = {config.data.cache_dir!r}: {place} is another user's folder"


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
            f"choose one of {', '.join(map(str, divisors(heads)))}",
        )
    if config.parallel.sequence and tensor == 1:
        reason = "sequence parallelism splits what tensor parallelism leaves whole"
        yield Problem("parallel.sequence", True, reason, "set it to false, or parallel.tensor > 1")
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
    """Keys that DeepSpeed would pass over, or that say otherwise than our own sections."""
    given = dict(config.deepspeed)
    for filled, source in FILLED_IN.items():
        if filled in given:
            value = given.pop(filled)
            yield Problem(f"deepspeed.{filled}", value, "filled in by the trainer", f"set {source}")
    yield from check_keys(given, KNOWN)
    half = given.get("fp16")
    enabled = half.get("enabled", True) if isinstance(half, dict) else None
    if isinstance(enabled, bool) and enabled != (config.train.dtype == "fp16"):
        reason = f"train.dtype is {config.train.dtype}"
        yield Problem("deepspeed.fp16", half, reason, "set train.dtype alone, or leave it out")


def check_stage(config: Config) -> Iterator[Problem]:
    """ZeRO stages that DeepSpeed refuses, or gets wrong without a word."""
    name, stage = "deepspeed.zero_optimization.stage", config.zero_stage
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


def check_update(config: Config) -> Iterator[Problem]:
    """Numbers of the update rule with which a run would learn nothing, or fly apart."""
    given = config.optimizer
    rate, clip, adam = given.learning_rate, given.gradient_clipping, given.type == "adamw"
    if 0 < rate < LEAST_RATE:
        reason, fix = "moves weights by less than float32 can tell", "choose about 0.001, or 0"
        yield Problem("optimizer.learning_rate", rate, reason, fix)
    if adam and rate > 1:
        reason, fix = "moves every weight by more than 1 a step", "choose about 0.001"
        yield Problem("optimizer.learning_rate", rate, reason, fix)
    if rate * given.weight_decay >= 1:
        reason = f"times optimizer.learning_rate = {rate} takes a step's whole weight away"
        yield Problem("optimizer.weight_decay", given.weight_decay, reason, "lower one of the two")
    if adam and 0 < clip <= given.eps:
        reason = f"leaves nothing of a gradient beside optimizer.eps = {given.eps}"
        yield Problem("optimizer.gradient_clipping", clip, reason, "choose about 1, or 0 for none")


def check_tasks(config: Config) -> Iterator[Problem]:
    """Tasks are scored on the model in training, which each process must be able to run alone."""
    if not config.evaluate.tasks:
        return
    reason = None
    if config.parallel.pipeline > 1 or config.parallel.sequence:
        reason = "scores during training need whole layers: no pipeline or sequence parallelism"
    elif config.zero_stage == 3:
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


def check_dealing(config: Config, processes: int) -> Iterator[Problem]:
    """Processes and batch sizes that have to multiply out."""
    parallel, train = config.parallel, config.train
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
    if data.path == BUILTIN:  # prepared at the start, by a tokenizer of this size
        if config.tokenizer.vocab_size > config.model.vocab_size:
            reason = f"more ids than model.vocab_size = {config.model.vocab_size}"
            fix = "lower it, or raise model.vocab_size"
            yield Problem("tokenizer.vocab_size", config.tokenizer.vocab_size, reason, fix)
        if data.validation_path is not None:
            reason = "not used, since data.path builtin has a validation set of its own"
            yield Problem("data.validation_path", data.validation_path, reason, "leave it out")
        if data.order == "preshuffled":
            reason = "data.path builtin holds documents, not rows of shuffled samples"
            yield Problem("data.order", data.order, reason, "set it to neox")
        return
    if data.validation_path is not None and is_part(data.validation_path, data.path):
        reason = "is the training data, on which a loss says nothing of what was learned"
        fix = "hold out data, or leave it out for data.validation_fraction of the training set"
        yield Problem("data.validation_path", data.validation_path, reason, fix)
        return
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


def is_part(path: str, of: str | list[str] | dict[str, float]) -> bool:
    """Whether token files are among others: the same file, under whatever name, or a copy."""

    def same(other: str) -> bool:
        mine, theirs = bin_path(path), bin_path(other)
        if mine.is_file() and theirs.is_file() and mine.samefile(theirs):
            return True
        known = manifest.recorded(path, "bin_sha256")
        copied = known is not None and known == manifest.recorded(other, "bin_sha256")
        return copied or mine.absolute() == theirs.absolute()

    try:
        return any(map(same, [of] if isinstance(of, str) else of))
    except Problem:
        return False  # a damaged manifest, which is told by itself


def check_cache(config: Config) -> Iterator[Problem]:
    """Maps that other users could write would decide what a run reads."""
    folder = config.data.cache_dir
    if folder is None:
        return
    path = Path(folder)
    place = nearest_folder(path)
    mode = place.stat().st_mode
    # In a sticky one, as /tmp is, a folder that the run makes is nobody's else to replace.
    own_is_safe = mode & stat.S_ISVTX and not path.exists()
    if mode & OPEN_TO_ALL and not own_is_safe:
        fix = "make a folder of your own in it first, and name that"
        yield Problem("data.cache_dir", folder, f"{place} can be written by every user", fix)
    elif theirs := strangers_folder(path):
        fix = "name a folder of your own"
        yield Problem("data.cache_dir", folder, f"{theirs} is another user's", fix)
    elif not place.is_dir() or not os.access(place, os.W_OK):
        fix = "name a folder of your own"
        yield Problem("data.cache_dir", folder, f"{place} cannot be written to", fix)


def nearest_folder(path: Path) -> Path:
    """The path itself or the nearest one above it that exists, links followed."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent)).resolve()


def divisors(number: int) -> list[int]:
    """The divisors of `number`, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
