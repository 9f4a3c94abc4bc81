"""torch.compile of the blocks, where it is asked for and a compiler works here."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def compile_blocks(
    blocks: Iterable[nn.Module], device: torch.device, backend: str = "inductor"
) -> str:
    """Compile each block in place, as one graph; returns what was done, in words.

    All plain blocks share a graph and so do all inhibited ones, in every step: what changes from
    step to step is inside the L2E operator. `fullgraph` turns a graph break into an error. Where
    no compiler works the blocks stay as they are, with the same numbers.
    """
    problem = why_no_compiler(device, backend)
    if problem:
        return f"not compiled: {problem}"
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
    return f"compiled, {backend}"


def why_no_compiler(device: torch.device, backend: str) -> str | None:
    """What went wrong when one small function was compiled; None if nothing did."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # a compiler may fail in any way; training goes on without it
        return " ".join(str(error).split())[:200]
    return None
