"""Write a checkpoint: every rank its share of the whole tensors, the first rank the rest.

Two parts. `Snapshot` needs all ranks and the engine: it gathers the state, tensor by tensor.
`complete` needs the disk alone, and may run in a thread while training goes on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.files import sync
from launch.runtime.checkpoint.canonical import agree, all_specs, whole
from launch.runtime.checkpoint.optimizer_state import MASTER, OptimizerState
from launch.runtime.disk import storage
from launch.runtime.disk.storage import FileRecord
from launch.runtime.disk.stored import CONFIG, L2E, RANDOM, STATE, file_name
from launch.runtime.disk.tensorfile import TensorSpec, write_tensor_file
from launch.runtime.disk.writing import WritingThread
from launch.runtime.engine import Engine

# What of the dynamic loss scale's state a checkpoint keeps.
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
    return complete(Snapshot(engine, directory, state, tokenizer))


class Snapshot:
    """An engine's state on its way to the disk.

    Building it is collective and takes all exchanges of the engine's own groups. With `copies` the
    state is whole in memory afterwards and the engine may change; without, it is on the disk but
    for the last tensors, and no more than a few lie in memory at once.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        state: dict[str, Any],
        tokenizer: Path | None = None,
        copies: bool = False,
        group: dist.ProcessGroup | None = None,
    ):
        """`group`: the ranks that complete it together, if not by the default group."""
        self.final = Path(directory) / storage.folder_name(state["step"])
        self.aside = self.final.with_name(self.final.name + ".tmp")
        self.group, self.tokenizer, self.settings = group, tokenizer, engine.config.checkpoint
        agree(lambda: storage.begin(self.final) if dist.get_rank() == 0 else None, self.cannot)
        optimizer = OptimizerState(engine.optimizer)
        self.small = {L2E: gather_l2e(engine), RANDOM: gather_random()}
        self.texts = {
            STATE: json.dumps(state | describe(engine, optimizer), indent=1),
            CONFIG: engine.config.model_dump_json(indent=1),
        }
        self.thread = write_tensors(engine, optimizer, self.aside, copies)

    def cannot(self, error: OSError) -> str:
        """What a failing disk means to a user."""
        return storage.cannot_write(self.final, error)

    def finish(self) -> dict[str, FileRecord]:
        """This rank's files, which are on the disk when this returns."""
        records = self.thread.finish()
        if dist.get_rank() == 0:
            for name, text in self.texts.items():
                records[name] = storage.write_text(self.aside / name, text + "\n")
            for name, tensors in self.small.items():
                records[name] = write_tensor_file(self.aside / name, tensors)
            if self.tokenizer is not None:
                name = "tokenizer" + self.tokenizer.suffix
                records[name] = storage.copy_file(self.tokenizer, self.aside / name)
            sync(self.aside)
        return records


def complete(snapshot: Snapshot) -> Path:
    """Bring a snapshot to the disk and give it its name; all ranks call it together.

    Raises:
        ValueError: on every rank, if any rank could not write; earlier checkpoints stay.
    """
    try:
        records = agree(snapshot.finish, snapshot.cannot, snapshot.group)
        agree(
            lambda: name_it(snapshot, records) if dist.get_rank() == 0 else None,
            snapshot.cannot,
            snapshot.group,
        )
    except ValueError:
        if dist.get_rank() == 0:
            shutil.rmtree(snapshot.aside, ignore_errors=True)
        raise
    return snapshot.final


def name_it(snapshot: Snapshot, records: list[dict[str, FileRecord]]) -> None:
    """The finished files become the newest checkpoint; old ones go."""
    files = {name: record for part in records for name, record in part.items()}
    storage.commit(snapshot.aside, snapshot.final, files)
    storage.point_latest(snapshot.final)
    settings = snapshot.settings
    storage.prune(
        snapshot.final.parent, settings.keep_last, settings.keep_every, set(settings.steps)
    )


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


def write_tensors(
    engine: Engine, optimizer: OptimizerState, aside: Path, copies: bool
) -> WritingThread:
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
    thread = WritingThread(aside, files, copies)
    try:
        for kind in names:
            for name, parameter in engine.named_parameters():
                tensor = whole(engine, name, parameter, optimizer.read(parameter, kind))
                if name in own:
                    thread.put(tensor)
    finally:
        thread.close()
    return thread


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
