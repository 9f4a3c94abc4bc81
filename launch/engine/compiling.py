"""torch.compile of the blocks, where it is asked for and a compiler works here."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from configs import Config
from configs.checks import compile_obstacles
from launch.engine.hardware import TORCH_DTYPES
from model.block import Block
from model.config import ModelConfig


def compile_as_asked(model: nn.Module, config: Config, device: torch.device) -> str:
    """Compile the model's blocks if train.compile says so; returns what was done, in words."""
    if config.train.compile is False:
        return "not compiled: train.compile is false"
    if config.train.compile == "auto":
        if device.type != "cuda":
            return f"not compiled: train.compile is 'auto', which is for GPUs, not {device.type}"
        for reason, _ in compile_obstacles(config):
            return f"not compiled: {reason}"
    use_own_cache()
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # float32 is meant to be exact
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return compile_blocks(blocks, config.model, device, TORCH_DTYPES[config.train.dtype])


def use_own_cache() -> None:
    """Let the compiler keep its code, which it runs, where no other user can put any.

    Its default is a folder of /tmp whose name anybody can guess, and make first.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = Path(tempfile.gettempdir(), f"l2e_inductor_{os.geteuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
    if not (private and found.st_uid == os.geteuid()):
        folder = Path(tempfile.mkdtemp(prefix="l2e_inductor_"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, compiled blocks run as they are written.

    A graph serves the shapes of training: others, as scoring has them, would each compile one more
    until there are too many. Hooks that came later would be passed over.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


def compile_blocks(
    blocks: Iterable[nn.Module],
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "inductor",
) -> str:
    """Compile each block in place, as one graph; returns what was done, in words.

    All plain blocks share a graph and so do all inhibited ones, in every step: what changes from
    step to step is inside the L2E operator. `fullgraph` turns a graph break into an error. Where
    no compiler works the blocks stay as they are, with the same numbers.
    """
    problem = why_no_compiler(config, device, dtype, backend)
    if problem:
        return f"not compiled: {problem}"
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
    return f"compiled, {backend}"


def why_no_compiler(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, backend: str
) -> str | None:
    """What went wrong when a small block of this kind was trained compiled; None if nothing did.

    A whole block in the run's own dtype: some compilers manage simpler code, or other dtypes.
    """
    small = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256}
    try:
        block = Block(0, config.model_copy(update=small), seed=0).to(device, dtype).train()
        block.compile(fullgraph=True, backend=backend)
        x = torch.ones(16, 2, 64, device=device, dtype=dtype, requires_grad=True)
        block(x).sum().backward()
    except Exception as error:  # a compiler may fail in any way; training goes on without it
        return " ".join(str(error).split())[:200]
    finally:
        torch.compiler.reset()  # else the real blocks would be a second shape of the same code
    return None
