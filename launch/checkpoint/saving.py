"""Write a checkpoint: every rank its share of the whole tensors, the first rank the rest.

Two parts. `Snapshot` needs all ranks and the engine: it gathers the state, tensor by tensor.
`complete` needs the disk alone, and may run in a thread while training goes on; `Saver` does so
for a run.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.files import sync
from l2e.progress import say
from launch.checkpoint import folders
from launch.checkpoint.canonical import all_specs, raise_on_all_ranks, whole
from launch.checkpoint.folders import FileRecord
from launch.checkpoint.optimizer_state import MASTER, OptimizerState
from launch.checkpoint.stored import CONFIG, L2E, RANDOM, STATE, file_name, identity_files
from launch.checkpoint.tensorfile import TensorSpec, WritingThread, write_tensor_file
from launch.engine.engine import Engine

NOT_SAVED = "saving failed, training goes on to the next checkpoint"
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
        self.final = Path(directory) / folders.folder_name(state["step"])
        self.temporary = self.final.with_name(self.final.name + ".tmp")
        self.group, self.tokenizer, self.settings = group, tokenizer, engine.config.checkpoint
        raise_on_all_ranks(
            lambda: folders.begin(self.final) if dist.get_rank() == 0 else None, self.cannot
        )
        optimizer = OptimizerState(engine.optimizer)
        self.small = {L2E: gather_l2e(engine), RANDOM: gather_random()}
        self.texts = {
            STATE: json.dumps(state | describe(engine, optimizer), indent=1),
            CONFIG: engine.config.model_dump_json(indent=1),
        }
        self.thread = write_tensors(engine, optimizer, self.temporary, copies)

    def cannot(self, error: OSError) -> str:
        """What a failing disk means to a user."""
        return folders.cannot_write(self.final, error)

    def finish(self) -> dict[str, FileRecord]:
        """This rank's files, which are on the disk when this returns."""
        records = self.thread.finish()
        if dist.get_rank() == 0:
            for name, text in self.texts.items():
                records[name] = folders.write_text(self.temporary / name, text + "\n")
            for name, tensors in self.small.items():
                records[name] = write_tensor_file(self.temporary / name, tensors)
            if self.tokenizer is not None:
                name = "tokenizer" + self.tokenizer.suffix
                records[name] = folders.copy_file(self.tokenizer, self.temporary / name)
                for path in identity_files(self.tokenizer):
                    records[path.name] = folders.copy_file(path, self.temporary / path.name)
            sync(self.temporary)
        return records


def complete(snapshot: Snapshot) -> Path:
    """Bring a snapshot to the disk and give it its name; all ranks call it together.

    Raises:
        ValueError: on every rank, if any rank could not write; earlier checkpoints stay.
    """
    try:
        records = raise_on_all_ranks(snapshot.finish, snapshot.cannot, snapshot.group)
        raise_on_all_ranks(
            lambda: publish(snapshot, records) if dist.get_rank() == 0 else None,
            snapshot.cannot,
            snapshot.group,
        )
    except ValueError:
        if dist.get_rank() == 0:
            shutil.rmtree(snapshot.temporary, ignore_errors=True)
        raise
    return snapshot.final


def publish(snapshot: Snapshot, records: list[dict[str, FileRecord]]) -> None:
    """The finished files become the newest checkpoint; old ones go."""
    files = {name: record for part in records for name, record in part.items()}
    folders.commit(snapshot.temporary, snapshot.final, files)
    folders.point_latest(snapshot.final)
    settings, directory = snapshot.settings, snapshot.final.parent
    try:
        folders.prune(directory, settings.keep_last, settings.keep_every, set(settings.steps))
    except OSError as error:  # this one is saved all the same
        say(f"not all old checkpoints in {directory} could be deleted: {error}")


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
    engine: Engine, optimizer: OptimizerState, temporary: Path, copies: bool
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
    thread = WritingThread(temporary, files, copies)
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
    return engine.of_all_stages({} if engine.controller is None else engine.controller.state_dict())


def gather_random() -> dict[str, Tensor]:
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    ranks: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {f"{rank}.{name}": t for rank, state in enumerate(ranks) for name, t in state.items()}


class Saver:
    """Saves a run's checkpoints, in the background if the configuration says so.

    By default on a GPU: the copy that is written lies in the host's memory, beside the device's.
    A save that fails is told at once and training goes on to the next one, until none has worked
    for `checkpoint.give_up` steps. The end of the `with` block waits for the last one.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        tokenizer: Path | None,
        say: Callable[[str], None],
        ready: Callable[[], object] = bool,
    ):
        """`say` prints a line of the run's first rank. All ranks build it together.

        ready: called by all ranks before each save; raises where there must be none.
        """
        self.ready = ready
        self.engine, self.directory, self.tokenizer, self.say = engine, directory, tokenizer, say
        settings = engine.config.checkpoint
        wanted = settings.background
        self.background = engine.device.type == "cuda" if wanted is None else wanted
        # The threads' exchanges, beside training's.
        self.group = dist.new_group(backend="gloo") if self.background else None
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.give_up = settings.give_up
        self.failing_since: int | None = None  # the step of the first save that failed
        self.must = True  # whether the save under way may not fail

    def save(self, state: dict[str, Any], must: bool = True) -> None:
        """Save the engine's state; returns as soon as training may go on.

        must: whether a failure is raised in any case, since no later save makes up for it.

        Raises:
            ValueError: as `save` does, or of the save before this one, if the run is to give up.
        """
        begin = time.monotonic()
        self.wait()
        step, self.must = state["step"], must
        try:
            raise_on_all_ranks(
                self.ready, lambda error: folders.cannot_write(self.directory, error)
            )
            snapshot = Snapshot(
                self.engine, self.directory, state, self.tokenizer, self.background, self.group
            )
            held_up = time.monotonic() - begin
            if not self.background:
                final = complete(snapshot)
        except ValueError as error:
            if fatal := self.fatal(error, step):
                raise fatal from None
            self.say(f"{NOT_SAVED}: {error}")
            return
        if not self.background:
            self.failing_since = None
            self.say(f"checkpoint {final} written in {time.monotonic() - begin:.1f} s")
            return

        def work() -> None:
            try:
                final = complete(snapshot)
            except Exception as error:  # not the end of a thread that nobody waits for yet
                self.say(f"{NOT_SAVED}: {error}")
                self.failure = self.fatal(error, step)
                return
            self.failing_since = None
            self.say(
                f"checkpoint {final} written in {time.monotonic() - begin:.1f} s, training was "
                f"held up for {held_up:.2f} s"
            )

        self.thread = threading.Thread(target=work, name="checkpoint")
        self.thread.start()

    def fatal(self, error: Exception, step: int) -> Exception | None:
        """What a save's failure means: None, if a later one may make up for it."""
        if self.failing_since is None:
            self.failing_since = step
        if self.must or not isinstance(error, ValueError):
            return error
        if step - self.failing_since < self.give_up:
            return None
        return ValueError(
            f"no checkpoint could be written since step {self.failing_since} (checkpoint.give_up = "
            f"{self.give_up} steps): {error}"
        )

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join()  # what the run has failed by is told, not this

    def wait(self) -> None:
        """Until the last save is on the disk.

        Raises:
            ValueError: on every rank, if any rank could not write it.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
