"""What the analyses are given: models in Hugging Face form, or checkpoints of this trainer."""

from pathlib import Path


def in_hugging_face_form(source: str, folder: Path) -> str:
    """`source` itself, or, for a run or checkpoint of this trainer, its copy in `folder`.

    The copy is exported once and found again as long as the checkpoint's files stay the same.
    """
    path = Path(source)
    is_run, is_checkpoint = (path / "checkpoints").is_dir(), (path / "state.json").is_file()
    if not (is_run or is_checkpoint):
        return source
    import torch

    from data.files import sha256
    from launch.runtime.disk.storage import MANIFEST
    from launch.runtime.disk.stored import open_checkpoint
    from launch.runtime.exporting import to_huggingface
    from launch.runtime.scores.scored import single_process

    stored = open_checkpoint(path)
    content = sha256(stored.folder / MANIFEST)[:12]
    run = stored.folder.resolve().parents[1].name
    exported = folder / f"{run}-{content}" / stored.folder.name
    if not exported.is_dir():
        exported.parent.mkdir(parents=True, exist_ok=True)
        with single_process():
            to_huggingface(stored, exported, torch.float32)
    print(f"{source}: analysed in Hugging Face form, {exported}")
    return str(exported)
