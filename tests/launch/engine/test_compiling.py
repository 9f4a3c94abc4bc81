"""Compiled blocks: whole graphs, one for plain and one for inhibited blocks, the same numbers."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import configs
from l2e import Controller, L2EConfig
from launch.engine import compiling
from model.block import Block
from model.config import ModelConfig

CPU = torch.device("cpu")
CONFIG = ModelConfig(num_layers=5, hidden_size=32, num_attention_heads=2, vocab_size=256)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Every test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(backend=None) -> list[torch.Tensor]:
    """Outputs and gradients of five blocks, three of them inhibited, over steps of every kind."""
    l2e = L2EConfig(layers=[1, 2, 3], late_start_step=2, weight=1.0, inhibit_fraction=0.1)
    blocks = [Block(number, CONFIG, l2e, seed=0).train() for number in range(5)]
    inhibitors = [block.mlp.inhibitor for block in blocks if block.mlp.inhibitor is not None]
    controller = Controller(inhibitors, l2e)
    if backend is not None:
        said = compiling.compile_blocks(blocks, CONFIG, CPU, torch.float32, backend)
        assert said.startswith("compiled")
    optimizer = torch.optim.SGD([p for block in blocks for p in block.parameters()], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    results = []
    for step in range(6):
        controller.measure = step % 2 == 1
        for _ in range(2):
            x = torch.randn(8, 2, 32, generator=generator).requires_grad_()
            out = x
            for block in blocks:
                out = block(out)
            out.square().mean().backward()
            results += [out.detach(), x.grad]
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        if controller.measure:
            ratios = [layer["mlp_to_residual"] for layer in controller.metrics().values()]
            results.append(torch.tensor(ratios))
    return results


def test_two_graphs_serve_all_blocks_and_steps(one_process):
    """`fullgraph` makes any graph break an error."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = train(counter)
    assert counter.frame_count <= 3  # the probe, plain blocks, inhibited blocks
    for found, wanted in zip(compiled, train(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_without_a_compiler_the_blocks_stay_as_they_are(one_process):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler found\nand much more")

    block = torch.nn.Linear(4, 4)
    said = compiling.compile_blocks([block], CONFIG, CPU, torch.float32, broken)
    assert said.startswith("not compiled: ")
    assert "no C++ compiler found" in said
    assert "\n" not in said
    assert block._compiled_call_impl is None


def test_a_compiler_that_fails_in_the_runs_dtype_alone_is_found_out(one_process):
    def broken_in_half(graph, inputs):
        if any(x.dtype == torch.bfloat16 for x in inputs if isinstance(x, torch.Tensor)):
            raise RuntimeError("no vectors of bfloat16")
        return graph

    for dtype, found in ((torch.float32, None), (torch.bfloat16, "no vectors of bfloat16")):
        said = compiling.why_no_compiler(CONFIG, CPU, dtype, broken_in_half)
        assert (said is None) if found is None else (found in said)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("parallel.tensor=2", "parallel.tensor = 2"),
        ("parallel.pipeline=2", "parallel.pipeline = 2"),
        ("deepspeed.zero_optimization.stage=3", "ZeRO-3"),
    ],
)
def test_layouts_that_split_a_blocks_graph_are_refused(override, reason):
    demo = Path(configs.__file__).parent / "demo.json"
    with pytest.raises(ValueError, match=rf"train\.compile = .*not with {reason}"):
        configs.load(demo, ["train.compile=true", override], processes=2)
