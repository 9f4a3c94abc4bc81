"""torch.compile of the blocks, each as one graph."""

import torch
from torch import nn

from model.block import Block
from model.linears import tensor_parallel_size


def compile_blocks(model: nn.Module) -> int:
    """Compiles every block of the model in place; returns how many.

    Plain blocks share one graph, an inhibited one has its own. Compilation itself happens at
    the first call; a graph break is an error there, never a silent slow path. On a CPU, bfloat16
    does not compile with torch 2.13: the C++ it writes for the norms declares a name twice.
    """
    if tensor_parallel_size() > 1:
        raise ValueError(
            f"torch.compile with parallel.tensor = {tensor_parallel_size()}: megatron-core's "
            "asynchronous all-reduce cannot be compiled; set parallel.tensor to 1 or do not compile"
        )
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    inhibited = sum(block.mlp.inhibitor is not None for block in blocks)
    # All blocks' graphs count against one limit: for each, training, measured steps, evaluation.
    limit = 8 + 4 * inhibited
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for block in blocks:
        block.compile(fullgraph=True)
    return len(blocks)
