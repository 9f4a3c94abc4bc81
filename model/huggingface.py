"""To and from Hugging Face's GPTNeoX form: `config.json` and the weight files beside it.

Our canonical names are the ones of Pythia's published files, so only the form is checked here:
buffers that old revisions stored are passed over, and every parameter must be there, once, in
its shape. Weights are read one tensor at a time and written one shard at a time.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from l2e.files import WEIGHT_FILES, keep_umask, read_pickled, weight_files
from model.config import ModelConfig
from model.parameters import parameter_shapes

HIDDEN_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
ACTIVATION = {name: ours for ours, name in HIDDEN_ACT.items()} | {
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}

# What old revisions stored beside the parameters: causal masks and rotary frequencies.
BUFFERS = re.compile(r"(^|\.)(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def hugging_face_config(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The shape as a `config.json` in the form Pythia's repositories have.

    Its special tokens are Pythia's; who knows the tokenizer puts its own in their place.
    """
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": HIDDEN_ACT[config.activation],
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_pct": config.rotary_percent,
        "rotary_emb_base": config.rotary_base,
        "layer_norm_eps": config.layer_norm_epsilon,
        "use_parallel_residual": config.parallel_residual,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read_config(folder: Path) -> ModelConfig:
    """The shape in a folder's `config.json`; ValueError if it is not a GPT-NeoX we can run."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: name a folder in Hugging Face's form")
    try:
        given = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again")
    problems = list(_unsupported(given))
    if problems:
        raise ValueError(f"{path} describes a model this trainer cannot run: {'; '.join(problems)}")
    rotary = {
        "partial_rotary_factor": given.get("rotary_pct", 0.25),
        "rope_theta": given.get("rotary_emb_base", 10000),
    } | (given.get("rope_parameters") or {})  # transformers 5 has its own place for them
    try:
        return ModelConfig.model_validate(
            {
                "num_layers": given["num_hidden_layers"],
                "hidden_size": given["hidden_size"],
                "num_attention_heads": given["num_attention_heads"],
                "intermediate_size": given["intermediate_size"],
                "vocab_size": given["vocab_size"],
                "max_position_embeddings": given["max_position_embeddings"],
                "rotary_percent": rotary.get(
                    "partial_rotary_factor", given.get("rotary_pct", 0.25)
                ),
                "rotary_base": rotary["rope_theta"],
                "parallel_residual": given.get("use_parallel_residual", True),
                "activation": ACTIVATION[given.get("hidden_act", "gelu")],
                "layer_norm_epsilon": given.get("layer_norm_eps", 1e-5),
            }
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the key {error}: it is not a GPT-NeoX config") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from None


def _unsupported(given: dict[str, Any]) -> Iterator[str]:
    """What in a Hugging Face configuration our model has no counterpart for."""
    if given.get("model_type") != "gpt_neox":
        yield f"model_type is {given.get('model_type')!r}, only 'gpt_neox' is supported"
    if given.get("hidden_act", "gelu") not in ACTIVATION:
        yield f"hidden_act is {given['hidden_act']!r}, supported are {', '.join(ACTIVATION)}"
    if given.get("tie_word_embeddings", False):
        yield "tie_word_embeddings is true, but Pythia's embeddings are untied"
    if not given.get("attention_bias", True):
        yield "attention_bias is false, but the attention has biases here"
    rotary = given.get("rope_scaling") or given.get("rope_parameters") or {}
    scaling = rotary.get("rope_type", rotary.get("type", "default"))
    if scaling != "default":
        yield f"rotary positions are scaled ({scaling!r}), only unscaled ones are supported"


class HuggingFaceWeights:
    """The weights in a folder, by canonical name, each read from its file when asked for.

    Opening checks that every parameter of `config` is there in its shape, and nothing else.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder = Path(folder)
        self.shapes = parameter_shapes(config)
        self._stored: dict[str, tuple[_Shard, str]] = {}
        for shard in _shards(self.folder):
            for name in shard.names():
                if not BUFFERS.search(name):
                    self._stored[canonical_name(name)] = (shard, name)
        self._check()

    def read(self, name: str) -> Tensor:
        """The whole tensor of this canonical name, in the stored dtype."""
        shard, stored_name = self._stored[name]
        return shard.read(stored_name)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, tensor), one tensor in memory at a time."""
        return ((name, self.read(name)) for name in self.shapes)

    def _check(self) -> None:
        problems = [f"{name} is missing" for name in self.shapes if name not in self._stored]
        for name, (shard, stored_name) in self._stored.items():
            shape = shard.shape(stored_name)
            if name not in self.shapes:
                problems.append(f"{name} {list(shape)} is no parameter of this model")
            elif shape != self.shapes[name]:
                problems.append(f"{name} is {list(shape)}, not {list(self.shapes[name])}")
        if problems:
            shown = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
            raise ValueError(
                f"the weights in {self.folder} do not fit its config.json "
                f"({len(problems)} problems): {shown}"
            )


def canonical_name(name: str) -> str:
    """Pythia's files and older `transformers` say embed_out, `transformers` 5 lm_head."""
    return "embed_out.weight" if name == "lm_head.weight" else name


def write_hugging_face(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """Writes `config.json` and safetensors files of at most `shard_bytes`; returns their paths.

    `read` gives the whole tensor of a canonical name, with or without padding rows; no more
    than one file's tensors are held at a time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = parameter_shapes(config)
    shards = cut_into_files(shapes, dtype, shard_bytes)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        # Rows past the logical vocabulary belong to a layout, not to the model.
        tensors = {name: read(name)[: shapes[name][0]].to(dtype).contiguous() for name in names}
        path, told = folder / file, {"format": "pt"}
        keep_umask(path, partial(save_file, tensors, path, metadata=told))
        written.append(path)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(prod, shapes.values())) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        written.append(_write_json(folder / "model.safetensors.index.json", index))
    written.append(_write_json(folder / "config.json", hugging_face_config(config, dtype)))
    return written


def cut_into_files(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
) -> list[list[str]]:
    """Names in order, cut into files before each would pass `shard_bytes`."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if files[-1] and used + size > shard_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files


def _write_json(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path


class _Shard:
    """One weight file, safetensors or a pickle of tensors, memory-mapped."""

    def __init__(self, path: Path):
        self._pickled = None
        if path.suffix != ".safetensors":
            self._pickled = read_pickled(path)
            return
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): fetch it again") from None

    def names(self) -> list[str]:
        return list(self._file.keys() if self._pickled is None else self._pickled)

    def shape(self, name: str) -> tuple[int, ...]:
        if self._pickled is None:
            return tuple(self._file.get_slice(name).get_shape())
        return tuple(self._pickled[name].shape)

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name) if self._pickled is None else self._pickled[name]


def _shards(folder: Path) -> list[_Shard]:
    """The folder's weight files, opened."""
    if paths := weight_files(folder):
        return [_Shard(path) for path in paths]
    raise ValueError(f"{folder} has no weights: expected {' or '.join(WEIGHT_FILES)}, or an index")
