"""Checkpoints to and from Hugging Face's form, and to other layouts."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from data.files import sha256, write_json
from data.tokenizer import load_tokenizer
from l2e.analysis.weights import fetch_model
from l2e.hub import parse
from l2e.problems import first_line
from launch.checkpoint import folders
from launch.checkpoint.folders import FileRecord
from launch.checkpoint.model_card import write_model_card
from launch.checkpoint.stored import (
    CONFIG,
    GENERATION,
    IDENTITY_FILES,
    L2E,
    MODEL,
    RANDOM,
    STATE,
    TOKENIZER_FILES,
    StoredCheckpoint,
    file_name,
    open_checkpoint,
)
from launch.checkpoint.tensorfile import TensorFile, TensorSpec, write_tensor_file
from launch.checkpoint.tokenizer_files import write_tokenizer
from launch.engine.groups import single_process
from model.config import ModelConfig
from model.huggingface import (
    HuggingFaceWeights,
    cut_into_files,
    read_config,
    write_hugging_face,
)

# Text that every machine has: the documentation in Python's own library.
REAL_TEXT = [str(module.__doc__) for module in (argparse, json, logging, shutil)]
# Largest difference of logits, over the largest logit, between our model and the export.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Tokens the comparison runs on.
COMPARED = 512
# A file of weights in Hugging Face's form, and of a checkpoint made from one.
SHARD_BYTES = 5 * 10**9


def to_huggingface(
    source: StoredCheckpoint, output: Path, dtype: torch.dtype, with_tokenizer: bool = True
) -> float:
    """Write `source` as `AutoModelForCausalLM.from_pretrained` loads it, with a model card.

    The two models' logits on real text are compared before the folder gets its name. Returns
    their largest difference relative to the largest logit. Memory: one model, one file of it.

    Raises:
        ValueError: the folder exists, or the logits differ.
    """
    config = source.model_config
    with new_folder(output) as temporary:
        write_hugging_face(temporary, config, source.read, dtype=dtype, shard_bytes=SHARD_BYTES)
        tokenizer = source.tokenizer if with_tokenizer else None
        special = source.state.get("special_tokens", {})
        if tokenizer is not None:
            special = write_tokenizer(tokenizer, temporary, REAL_TEXT, source.end_of_text) | special
        else:
            copy_files(temporary, [source.folder / GENERATION])
        write_special_tokens(temporary, special)
        write_model_card(source, temporary, output.name, tokenizer is not None)
        tokens = sample_tokens(tokenizer, config)
        difference = compare(tokens, source.build_model, lambda: load_exported(temporary))
        if not difference <= TOLERANCE[dtype]:
            raise ValueError(
                f"{output}: the export's logits differ from the model's by {difference:.1e} of "
                f"the largest one, more than {TOLERANCE[dtype]:.0e}; nothing was written. This "
                "is a bug: please report it with the checkpoint's config.json"
            )
        temporary.rename(output)
    return difference


def write_special_tokens(folder: Path, special: dict[str, Any]) -> None:
    """The ids that begin and end a text, into the export's configurations; null where unknown."""
    path, generation = folder / "config.json", folder / GENERATION
    unknown = {"bos_token_id": None, "eos_token_id": None}
    write_json(path, json.loads(path.read_bytes()) | unknown | special)
    if special and not generation.is_file():
        write_json(generation, {"_from_model_config": True, **special})


def in_hugging_face_form(source: str, folder: str | Path) -> str:
    """`source` itself, or, for a run or checkpoint of this trainer, its copy in `folder`.

    The copy is exported once and found again as long as the checkpoint's files stay the same.
    """
    path = Path(source)
    is_run, is_checkpoint = (path / "checkpoints").is_dir(), (path / "state.json").is_file()
    if not (is_run or is_checkpoint):
        return source
    stored = open_checkpoint(path)
    files = folders.file_list(stored.folder)
    assert files is not None  # it could be opened
    content = sha256(files)[:12]
    run = stored.folder.resolve().parents[1].name
    exported = Path(folder) / f"{run}-{content}" / stored.folder.name
    if not exported.is_dir():
        exported.parent.mkdir(parents=True, exist_ok=True)
        with single_process():
            to_huggingface(stored, exported, torch.float32)
    print(f"{source}: analysed in Hugging Face form, {exported}")
    return str(exported)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, which must not exist yet; gone where filling it fails."""
    if output.exists():
        raise ValueError(f"--output {output}: exists already; name a new folder")
    temporary = folders.begin(output)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sample_tokens(tokenizer: Path | None, config: ModelConfig) -> Tensor:
    """Tokens [1, positions] of real text; its bytes where the tokenizer is unknown."""
    text = "\n".join(REAL_TEXT)
    tokens = load_tokenizer(tokenizer).encode(text) if tokenizer else list(text.encode())
    length = min(COMPARED, config.max_position_embeddings)
    return torch.tensor([[token % config.vocab_size for token in tokens[:length]]])


@torch.no_grad()
def compare(tokens: Tensor, ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    """Largest difference of two models' logits over the largest logit; one in memory at a time."""
    expected = ours()(tokens)
    return float((theirs()(tokens).logits - expected).abs().max() / expected.abs().max())


def load_exported(folder: Path) -> Any:
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def from_huggingface(source: str, output: Path) -> dict[str, Any]:
    """A checkpoint at step 0 from a model in Hugging Face's form; any layout can resume from it.

    Raises:
        ValueError: not a GPT-NeoX model, a missing file or tensor, or `output` exists.
    """
    folder = local_folder(source)
    config = read_config(folder)
    weights = HuggingFaceWeights(folder, config)
    with new_folder(output) as temporary:
        records = dict(write_weights(weights, temporary))
        state = {
            "step": 0,
            "tokens": 0,
            "source": source,
            "optimizer": {"type": None, "moments": [], "steps": 0},
            "loss_scaler": {},
            "special_tokens": special_tokens(folder),
        }
        records[STATE] = folders.write_text(temporary / STATE, json.dumps(state, indent=1))
        settings = {"model": config.model_dump()}
        records[CONFIG] = folders.write_text(temporary / CONFIG, json.dumps(settings, indent=1))
        for name in (L2E, RANDOM):
            records[name] = write_tensor_file(temporary / name, {})
        names = (*TOKENIZER_FILES, *IDENTITY_FILES)
        records |= copy_files(temporary, [folder / name for name in names])
        folders.commit(temporary, output, records)
    return state


def special_tokens(folder: Path) -> dict[str, Any]:
    """The ids that begin and end a text, as the model's own configuration has them."""
    config = json.loads((folder / "config.json").read_bytes())
    return {
        name: config[name]
        for name in ("bos_token_id", "eos_token_id")
        if config.get(name) is not None
    }


def local_folder(source: str) -> Path:
    """A folder as it is; a hub id's files, fetched."""
    if Path(source).is_dir():
        return Path(source)
    name = parse(source)
    if Path(source).exists() or name.repository.count("/") != 1:
        raise ValueError(
            f"--model {source}: neither a folder nor a hub id (owner/name or owner/name@revision)"
        )
    try:
        return fetch_model(*name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {source}: cannot be fetched from the hub ({first_line(error)})"
        ) from None


def write_weights(weights: HuggingFaceWeights, temporary: Path) -> Iterator[tuple[str, FileRecord]]:
    """The weights in float32, in files of about `SHARD_BYTES`, one tensor in memory at a time."""
    files = cut_into_files(weights.shapes, torch.float32, SHARD_BYTES)
    for number, names in enumerate(files, 1):
        path = temporary / file_name(MODEL, number, len(files))
        specs = {name: TensorSpec(weights.shapes[name], torch.float32) for name in names}
        file = TensorFile(path, specs)
        for name in names:
            file.write(name, weights.read(name).float())
        yield path.name, file.close()


def reshard(source: StoredCheckpoint, output: Path, tensor: int, pipeline: int) -> None:
    """A copy of `source` whose configuration asks for another layout.

    Tensors are stored whole, so nothing else changes: every layout loads every checkpoint, and
    `--resume` needs no such copy.

    Raises:
        ValueError: the model cannot be cut so, or `output` exists.
    """
    check_layout(source.model_config, tensor, pipeline)
    with new_folder(output) as temporary:
        config = source.config
        layout = {"tensor": tensor, "pipeline": pipeline}
        config["parallel"] = config.get("parallel", {}) | layout
        names = [name for name in folders.read_records(source.folder) if name != CONFIG]
        records = copy_files(temporary, [source.folder / name for name in names])
        records[CONFIG] = folders.write_text(temporary / CONFIG, json.dumps(config, indent=1))
        folders.commit(temporary, output, records)


def check_layout(config: ModelConfig, tensor: int, pipeline: int) -> None:
    if tensor < 1 or config.num_attention_heads % tensor:
        raise ValueError(
            f"--tensor {tensor}: must divide the {config.num_attention_heads} attention heads"
        )
    if not 1 <= pipeline <= config.num_layers:
        raise ValueError(f"--pipeline {pipeline}: from 1 to the {config.num_layers} layers")


def copy_files(folder: Path, paths: list[Path]) -> dict[str, FileRecord]:
    """Copy those files that exist to the disk, and say what they are."""
    return {
        path.name: folders.copy_file(path, folder / path.name) for path in paths if path.is_file()
    }
