"""Checkpoints of a run that any layout can load.

Every tensor is stored whole, in float32, under its canonical (Hugging Face) name, with the
vocabulary's own rows only: no trace of tensor, pipeline or data parallelism or of a ZeRO stage. A
rank that loads reads its slices. What a folder `step_0000100` holds:

    model-00001-of-00002.safetensors      master weights, spread over the ranks that wrote them
    exp_avg-..., exp_avg_sq-...           the optimizer's moments, likewise
    l2e.safetensors                       statistics and thresholds of the inhibited layers
    random.safetensors                    each rank's random state
    state.json                            step, tokens, layout, loss scale, optimizer
    tokenizer.json or tokenizer.model     the run's tokenizer
    config.json                           the run's configuration
    manifest.json                         size and SHA-256 of every file
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from launch.runtime import storage
from launch.runtime.engine import Engine
from launch.runtime.optimizer_state import MASTER, OptimizerState, local_shape
from launch.runtime.storage import FileRecord
from launch.runtime.stored import CONFIG, MODEL, STATE, StoredCheckpoint
from launch.runtime.tensorfile import TensorFile, TensorSpec
from launch.runtime.writing import WritingThread

L2E = "l2e.safetensors"
RANDOM = "random.safetensors"
# Parameters whose first dimension is the vocabulary, which layouts pad.
VOCABULARY = ("gpt_neox.embed_in.weight", "embed_out.weight")
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save(
    engine: Engine, directory: Path, state: dict[str, Any], tokenizer: Path | None = None
) -> Path:
    """Write the checkpoint of `state["step"]` into `directory`; all ranks call it together.

    `state` is given back by `load`; `tokenizer` is the run's tokenizer file.

    Then deletes old checkpoints as the configuration says. Returns the checkpoint's folder.

    Raises:
        ValueError: on every rank, if any rank could not write; earlier checkpoints stay.
    """
    final = Path(directory) / storage.folder_name(state["step"])
    aside = final.with_name(final.name + ".tmp")
    agree(lambda: storage.begin(final) if dist.get_rank() == 0 else None)
    try:
        records = agree(lambda: write_all(engine, aside, state, tokenizer))
        agree(lambda: finish(engine, aside, final, records) if dist.get_rank() == 0 else None)
    except ValueError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def finish(engine: Engine, aside: Path, final: Path, records: list[dict]) -> None:
    storage.commit(aside, final, {name: r for part in records for name, r in part.items()})
    storage.point_latest(final)
    settings = engine.config.checkpoint
    storage.prune(final.parent, settings.keep_last, settings.keep_every)


def agree(work) -> list[Any]:
    """Do `work` on every rank; every rank gets all results, or the first failure.

    Raises:
        ValueError: some rank's disk or input failed; no rank is left waiting for it.
    """
    result, failure = None, None
    try:
        result = work()
    except OSError as error:
        failure = storage.cannot_write(Path(error.filename or "."), error)
    except ValueError as error:
        failure = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (result, failure))
    for _, message in everyone:
        if message is not None:
            raise ValueError(message)
    return [one for one, _ in everyone]


def write_all(
    engine: Engine, aside: Path, state: dict[str, Any], tokenizer: Path | None
) -> dict[str, FileRecord]:
    """This rank's files of a checkpoint.

    All exchanges come before the first thing that a disk can fail, or are kept up while it fails.
    """
    optimizer = OptimizerState(engine.optimizer)
    l2e = gather_l2e(engine)
    random = gather_random()
    records = write_tensors(engine, optimizer, aside)
    if dist.get_rank() == 0:
        texts = {
            STATE: json.dumps(state | describe(engine, optimizer), indent=1),
            CONFIG: engine.config.model_dump_json(indent=1),
        }
        for name, text in texts.items():
            records[name] = storage.write_text(aside / name, text + "\n")
        for name, tensors in ((L2E, l2e), (RANDOM, random)):
            records[name] = write_small(aside / name, tensors)
        if tokenizer is not None:
            name = "tokenizer" + Path(tokenizer).suffix
            records[name] = storage.copy_file(Path(tokenizer), aside / name)
        storage.sync_folder(aside)
    return records


def describe(engine: Engine, optimizer: OptimizerState) -> dict[str, Any]:
    """The part of state.json that is the engine's."""
    layout = engine.layout
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        "dtype": engine.config.train.dtype,
        "zero_stage": engine.config.zero_stage,
        "layout": {
            "tensor": layout.tensor_size,
            "pipeline": layout.pipeline_size,
            "data": layout.data_size,
        },
        "optimizer": {
            "type": engine.config.optimizer.type,
            "moments": list(optimizer.moments),
            "steps": optimizer.steps,
        },
        "loss_scaler": {key: getattr(scaler, key) for key in LOSS_SCALER if hasattr(scaler, key)},
    }


# --- the tensors -----------------------------------------------------------------------------


def full_spec(engine: Engine, name: str, parameter: Parameter) -> TensorSpec:
    """Shape of a parameter without its layout's cuts and padding."""
    shape = list(local_shape(parameter))
    if is_sharded(parameter):
        shape[parameter.partition_dim] *= engine.layout.tensor_size
    if name in VOCABULARY:
        shape[0] = engine.config.model.vocab_size
    return TensorSpec(tuple(shape), torch.float32)


def is_sharded(parameter: Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def all_specs(engine: Engine) -> list[dict[str, TensorSpec]]:
    """Name -> shape of every parameter, by pipeline stage."""
    own = {name: full_spec(engine, name, p) for name, p in engine.named_parameters()}
    stages: list[dict[str, TensorSpec]] = [{}] * engine.layout.pipeline_size
    dist.all_gather_object(stages, own, group=engine.layout.pipeline_group)
    return stages


def spread(specs: dict[str, TensorSpec], writers: int) -> list[list[str]]:
    """The names each of a stage's ranks writes: about the same number of bytes each."""
    shares: list[list[str]] = [[] for _ in range(writers)]
    load = [0] * writers
    for name in sorted(specs, key=lambda name: (-specs[name].bytes, name)):
        lightest = load.index(min(load))
        shares[lightest].append(name)
        load[lightest] += specs[name].bytes
    order = {name: place for place, name in enumerate(specs)}
    return [sorted(share, key=order.__getitem__) for share in shares if share]


def write_tensors(engine: Engine, optimizer: OptimizerState, aside: Path) -> dict[str, FileRecord]:
    """Master weights and moments: each tensor is whole on its ranks for a moment, one writes it."""
    layout = engine.layout
    stages = all_specs(engine)
    shares = [spread(specs, layout.tensor_size * layout.data_size) for specs in stages]
    before = sum(len(stage) for stage in shares[: layout.pipeline_rank])
    total = sum(len(stage) for stage in shares)
    writer = layout.data_rank * layout.tensor_size + layout.tensor_rank
    mine = shares[layout.pipeline_rank][writer : writer + 1]
    own = {name: stages[layout.pipeline_rank][name] for share in mine for name in share}
    names = (MASTER, *optimizer.moments)
    files = {file_name(kind, before + writer + 1, total): own for kind in names if own}
    thread = WritingThread(aside, files)
    try:
        for kind in names:
            for name, parameter in engine.named_parameters():
                tensor = whole(engine, name, parameter, optimizer.read(parameter, kind))
                if name in own:
                    thread.put(tensor)
    finally:
        records = thread.finish()
    return records


def file_name(kind: str, number: int, total: int) -> str:
    prefix = MODEL if kind == MASTER else kind
    return f"{prefix}-{number:05d}-of-{total:05d}.safetensors"


def whole(engine: Engine, name: str, parameter: Parameter, shard: Tensor) -> Tensor:
    """The tensor that the tensor-parallel ranks hold together, without padded vocabulary rows."""
    if is_sharded(parameter) and engine.layout.tensor_size > 1:
        shards = [torch.empty_like(shard) for _ in range(engine.layout.tensor_size)]
        dist.all_gather(shards, shard.contiguous(), group=engine.layout.tensor_group)
        shard = torch.cat(shards, dim=parameter.partition_dim)
    return shard[: engine.config.model.vocab_size] if name in VOCABULARY else shard


def write_small(path: Path, tensors: dict[str, Tensor]) -> FileRecord:
    file = TensorFile(
        path, {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    )
    for name, tensor in tensors.items():
        file.write(name, tensor)
    return file.close()


def gather_l2e(engine: Engine) -> dict[str, Tensor]:
    """The inhibited layers' state, of all pipeline stages."""
    own = {} if engine.controller is None else engine.controller.state_dict()
    stages: list[dict[str, Tensor]] = [{}] * engine.layout.pipeline_size
    dist.all_gather_object(stages, own, group=engine.layout.pipeline_group)
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def gather_random() -> dict[str, Tensor]:
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    ranks: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {f"{rank}.{name}": t for rank, state in enumerate(ranks) for name, t in state.items()}


# --- loading ---------------------------------------------------------------------------------


def load(engine: Engine, folder: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Bring a fresh engine to the state of the checkpoint `folder`; all ranks call it together.

    Any layout, ZeRO stage and dtype may load any other's. `tokenizer` is the run's tokenizer file,
    held against the checkpoint's. Returns what `save` was given.

    Raises:
        ValueError: the checkpoint is of another model, or a tensor is missing or left over; the
            engine's weights are then untouched.
    """
    stored = StoredCheckpoint(folder)
    state = stored.state
    optimizer = OptimizerState(engine.optimizer)
    moments = tuple(state["optimizer"]["moments"])
    expected = {name: spec for stage in all_specs(engine) for name, spec in stage.items()}
    agree(lambda: check(engine, stored, expected, moments, tokenizer))
    if moments:
        optimizer.create()
        agree(lambda: check_moments(engine, state, optimizer.moments, moments))
    for kind in (MASTER, *moments):
        for name, parameter in engine.named_parameters():
            slices = stored.tensors[MODEL if kind == MASTER else kind]
            value = own_slice(engine, parameter, slices[name])
            optimizer.write(parameter, kind, value.to(engine.device))
    if moments:
        optimizer.set_steps(state["optimizer"]["steps"])
    elif dist.get_rank() == 0 and state["step"]:
        print(f"{folder} has no optimizer state: the optimizer starts afresh", flush=True)
    load_l2e(engine, stored.folder)
    load_random(stored.folder)
    for key, value in state["loss_scaler"].items():
        if hasattr(getattr(engine.optimizer, "loss_scaler", None), key):
            setattr(engine.optimizer.loss_scaler, key, value)
    return state


def check(
    engine: Engine,
    stored: StoredCheckpoint,
    expected: dict[str, TensorSpec],
    moments: tuple[str, ...],
    tokenizer: Path | None,
) -> None:
    """The checkpoint is of this very model and tokenizer, and complete, to the last tensor."""
    ours, theirs = engine.config.model.model_dump(), stored.config["model"]
    differ = [key for key in ours if key != "preset" and theirs.get(key) != ours[key]]
    if differ:
        raise ValueError(
            f"{stored.folder} is of another model: "
            + ", ".join(f"{key} is {theirs.get(key)} there and {ours[key]} here" for key in differ)
            + ". Resume with the configuration it was written with (its config.json)"
        )
    kept = stored.tokenizer
    if tokenizer is not None and kept is not None and Path(tokenizer).suffix == kept.suffix:
        hashes = [storage.file_hash(Path(path)) for path in (tokenizer, kept)]
        if hashes[0] != hashes[1]:
            raise ValueError(
                f"{stored.folder} was trained with another tokenizer than {tokenizer}: their "
                f"contents differ. Set tokenizer.path to {kept}, and prepare the "
                "corpus with it"
            )
    for kind in (MODEL, *moments):
        found = {
            name: tuple(part.get_shape()) for name, part in stored.tensors.get(kind, {}).items()
        }
        problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
        problems += [f"{name} is unknown to this model" for name in found.keys() - expected.keys()]
        problems += [
            f"{name} has the shape {found[name]} instead of {spec.shape}"
            for name, spec in expected.items()
            if name in found and found[name] != spec.shape
        ]
        if problems:
            raise ValueError(
                f"{stored.folder}, {kind}: {'; '.join(sorted(problems)[:5])}"
                + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
                + ". Nothing was loaded"
            )


def check_moments(
    engine: Engine, state: dict[str, Any], ours: tuple[str, ...], theirs: tuple[str, ...]
) -> None:
    if ours != theirs:
        raise ValueError(
            f"the checkpoint's optimizer is {state['optimizer']['type']} with "
            f"{', '.join(theirs) or 'no moments'}, optimizer.type {engine.config.optimizer.type} "
            f"has {', '.join(ours) or 'none'}; set optimizer.type to "
            f"{state['optimizer']['type']!r}"
        )


def own_slice(engine: Engine, parameter: Parameter, stored: Any) -> Tensor:
    """This rank's part of a stored tensor; padded vocabulary rows are zeros."""
    shape = local_shape(parameter)
    if not is_sharded(parameter):
        value = stored[:]
    else:
        size = shape[parameter.partition_dim]
        start = size * engine.layout.tensor_rank
        length = stored.get_shape()[parameter.partition_dim]
        part = slice(min(start, length), min(start + size, length))
        value = stored[part] if parameter.partition_dim == 0 else stored[:, part]
    if value.shape != shape:
        padded = value.new_zeros(shape)
        padded[: len(value)] = value
        value = padded
    return value


def load_l2e(engine: Engine, folder: Path) -> None:
    tensors = dict(read_small(folder / L2E))
    if engine.controller is not None and tensors:
        engine.controller.load_state_dict(tensors)
    elif engine.config.l2e.method != "none" and dist.get_rank() == 0 and not tensors:
        print(f"{folder} has no L2E state: its statistics start afresh", flush=True)


def load_random(folder: Path) -> None:
    """Each rank's random state; a run on another number of ranks starts with its own seeds."""
    states = dict(read_small(folder / RANDOM))
    rank = dist.get_rank()
    if sum(name.endswith(".cpu") for name in states) != dist.get_world_size():
        return
    torch.set_rng_state(states[f"{rank}.cpu"])
    if torch.cuda.is_available() and f"{rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank}.cuda"])


def read_small(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


# --- which checkpoint ------------------------------------------------------------------------


def find_resumable(run_folder: Path, resume: str) -> Path | None:
    """The checkpoint `--resume` means, every file of it verified.

    "auto": the newest intact one of the run, after saying what is wrong with newer ones; None if
    the run has none. "none": None. Otherwise a checkpoint's folder, or a run's for its newest.
    Before process groups exist each process may call it; with one, ranks share the hashing.

    Raises:
        ValueError: a named checkpoint is damaged, or all of a run's are.
    """
    if resume == "none":
        return None
    named = Path(run_folder if resume == "auto" else resume)
    if resume != "auto" and not (named / "checkpoints").is_dir():
        problems = verify(named)
        if problems:
            raise ValueError(
                f"--resume {resume}: {'; '.join(problems)}. Use `--resume auto` for the newest "
                "intact checkpoint of the run, or name another one"
            )
        return named
    found = storage.checkpoints(named / "checkpoints")
    for candidate in found:
        problems = verify(candidate)
        if not problems:
            return candidate
        if first_rank():
            print(f"{candidate} is damaged and passed over: {'; '.join(problems)}", flush=True)
    if found:
        raise ValueError(
            f"--resume {resume}: all {len(found)} checkpoints in {named / 'checkpoints'} are "
            "damaged (see above). Restore one from a copy, or start over with --resume none"
        )
    if resume != "auto":
        raise ValueError(f"--resume {resume}: {named / 'checkpoints'} holds no checkpoint")
    return None


def verify(folder: Path) -> list[str]:
    """`storage.damage`, the hashing shared between the ranks where there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return storage.damage(folder)
    try:
        names = sorted(storage.read_manifest(folder))
    except ValueError as error:
        return [str(error)]
    own = storage.damage(folder, names[dist.get_rank() :: dist.get_world_size()])
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return [problem for problems in everyone for problem in problems]


def first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
