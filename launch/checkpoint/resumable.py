"""Which checkpoint a run goes on from."""

from pathlib import Path

import torch.distributed as dist

from data.files import read_json, sha256
from launch.checkpoint import folders


def find_resumable(run_folder: Path, resume: str) -> Path | None:
    """The checkpoint `--resume` means, every file of it verified.

    "auto": the one that the run's file `latest` names, or the newest intact one before it, after
    saying what is wrong with those passed over; None if the run has none. "none": None. Otherwise
    a checkpoint's folder, or a run's for its latest.
    Before process groups exist each process may call it; with one, ranks share the hashing.

    Raises:
        ValueError: a named checkpoint is damaged, or all of a run's are.
    """
    if resume == "none":
        return None
    named = Path(run_folder if resume == "auto" else resume)
    refuse_unlike(resume)
    if resume != "auto" and not (named / "checkpoints").is_dir():
        problems = verify(named)
        if problems:
            raise ValueError(
                f"--resume {resume}: {'; '.join(problems)}. Use `--resume auto` for the newest "
                "intact checkpoint of the run, or name another one"
            )
        return named
    found = folders.current(named / "checkpoints")
    if found and folders.latest(named / "checkpoints") is None and first_rank():
        print(
            f"{named / 'checkpoints' / folders.LATEST} names no checkpoint: taking the newest",
            flush=True,
        )
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


def listed(run_folder: Path, resume: str) -> dict[str, str]:
    """The checkpoints among which `find_resumable` looks, as this host sees them: each one's name
    and the hash of its list of files."""
    if resume == "none":
        return {}
    named = Path(run_folder if resume == "auto" else resume)
    one = resume != "auto" and not (named / "checkpoints").is_dir()
    found = [named] if one else folders.current(named / "checkpoints")
    lists = {path.name: folders.file_list(path) for path in found}
    return {name: sha256(file) if file else "unfinished" for name, file in lists.items()}


def refuse_unlike(resume: str) -> None:
    """Raise ValueError for a path of `--resume` that is no checkpoint's nor a run's, at a look."""
    named = Path(resume)
    if resume in ("auto", "none") or (named / "checkpoints").is_dir():
        return
    if not named.exists():
        fix = "give auto, none, or the folder of a run or of one of its checkpoints"
        raise ValueError(f"--resume {resume}: no such folder; {fix}")
    if not named.is_dir():
        raise ValueError(f"--resume {resume}: is a file; give the folder of the checkpoint")
    if folders.file_list(named) is not None:
        return
    if is_hugging_face_form(named):
        raise ValueError(
            f"--resume {resume}: is a model in Hugging Face form; make a checkpoint of it by "
            f"launch/export.py from-hf --model {named} --output FOLDER, and resume that"
        )
    if found := folders.checkpoints(named):
        raise ValueError(
            f"--resume {resume}: holds checkpoints and is none; give one of them, as {found[0]}, "
            f"or the run's folder, {named.parent}"
        )
    raise ValueError(
        f"--resume {resume}: no finished checkpoint: {folders.FILES} is missing (a save that was "
        "interrupted, or another kind of folder). Use `--resume auto` for the newest intact "
        "checkpoint of the run, or name another one"
    )


def is_hugging_face_form(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and "model_type" in (read_json(path, lambda _: None) or {})


def verify(folder: Path) -> list[str]:
    """`folders.damage`, the hashing shared between the ranks where there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return folders.damage(folder)
    try:
        names = sorted(folders.read_records(folder))
    except ValueError as error:
        return [str(error)]
    own = folders.damage(folder, names[dist.get_rank() :: dist.get_world_size()])
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return [problem for problems in everyone for problem in problems]


def first_rank() -> bool:
    """Whether this process speaks for the run."""
    return not dist.is_initialized() or dist.get_rank() == 0
