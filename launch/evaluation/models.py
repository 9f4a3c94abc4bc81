"""Models on disk, ready to be scored: Hugging Face folders and our own checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from data.tokenizer import load_tokenizer
from l2e.hub import parse, refuse_stray_links
from l2e.memory import LARGER_MACHINE, refuse_larger
from l2e.problems import first_line
from launch.checkpoint.stored import TOKENIZER_FILES, StoredCheckpoint
from launch.evaluation.harness import Scored
from model.attention import remembering
from model.gpt_neox import GPTNeoX


def from_checkpoint(source: StoredCheckpoint, dtype: torch.dtype, device: torch.device) -> Scored:
    """One of our checkpoints; needs `single_process`.

    Raises:
        ValueError: it has no tokenizer.
    """
    if source.tokenizer is None:
        raise ValueError(
            f"{source.folder} has no tokenizer; put the run's tokenizer.json or tokenizer.model "
            "into that folder"
        )
    model = source.build_model().to(device, dtype)
    return from_model(model, source.tokenizer, device, source.end_of_text)


def from_model(
    model: GPTNeoX, tokenizer_file: Path, device: torch.device, end_of_text: str | None = None
) -> Scored:
    """Our own model; tensor-parallel ranks must score the same batches."""
    tokenizer = load_tokenizer(tokenizer_file, end_of_text)
    return Scored(
        # Our residual stream has the sequence first: [positions, batch, hidden].
        hidden=lambda tokens: model.gpt_neox(tokens).transpose(0, 1),
        head=lambda states: model.embed_out(states[:, None])[0],
        remembering=lambda: remembering(model),
        tokenizer=tokenizer,
        maximum_length=model.config.max_position_embeddings,
        end_of_document=tokenizer.eod,
        device=device,
    )


def from_huggingface(source: str | Path, dtype: torch.dtype, device: torch.device) -> Scored:
    """A GPT-NeoX model and its tokenizer: a folder in Hugging Face form, or owner/name@revision.

    Raises:
        ValueError: not such a model, another kind of model, or no tokenizer.
    """
    from transformers import GPTNeoXForCausalLM  # seconds that our own checkpoints don't need

    config = huggingface_config(source)
    refuse_larger(f"{source} in {dtype}", dtype.itemsize * size_of(config), LARGER_MACHINE)
    tokenizer = load_tokenizer(huggingface_tokenizer(source))
    transformers.utils.logging.disable_progress_bar()
    name, revision = parse(source)
    model = GPTNeoXForCausalLM.from_pretrained(
        name, config=config, dtype=dtype, revision=revision or "main"
    )
    nn.Module.to(model, device).eval()
    cache: list[transformers.DynamicCache] = []  # one while a text is generated

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        past = {"past_key_values": cache[-1]} if cache else {}
        return model.gpt_neox(tokens, use_cache=bool(cache), **past).last_hidden_state

    @contextmanager
    def remembering() -> Iterator[None]:
        cache.append(transformers.DynamicCache())
        try:
            yield
        finally:
            cache.clear()

    return Scored(
        hidden=hidden,
        head=model.get_output_embeddings(),
        remembering=remembering,
        tokenizer=tokenizer,
        maximum_length=config.max_position_embeddings,
        end_of_document=tokenizer.eod,
        device=device,
    )


def size_of(config: transformers.GPTNeoXConfig) -> int:
    """Parameters of a model of this shape, which is not made for it."""
    from transformers import GPTNeoXForCausalLM

    with torch.device("meta"):
        return GPTNeoXForCausalLM(config).num_parameters()


def huggingface_config(source: str | Path) -> transformers.GPTNeoXConfig:
    """config.json of a GPT-NeoX model in Hugging Face form."""
    name, revision = parse(source)
    try:
        refuse_stray_links(source)
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: neither one of our checkpoints (files.json) nor a model in Hugging "
            f"Face form ({first_line(error)})"
        ) from None
    if config.model_type != "gpt_neox":
        raise ValueError(
            f"{source}: config.json says model_type {config.model_type!r}; this project reads "
            "'gpt_neox' (the Pythia models). lm-eval's own `--model hf` scores other kinds"
        )
    return config


def huggingface_tokenizer(source: str | Path) -> Path:
    """The tokenizer's file, fetched if `source` is a hub id."""
    repository, revision = parse(source)
    for name in TOKENIZER_FILES:
        found = cached_file(
            repository, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        if found:
            return Path(found)
    raise ValueError(
        f"{source}: has no {' or '.join(TOKENIZER_FILES)}; put the model's tokenizer file beside "
        "its config.json"
    )
