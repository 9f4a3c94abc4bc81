"""Compiled blocks: whole graphs, one for plain and one for inhibited blocks, the same numbers."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import configs
from l2e import Controller, L2EConfig, L2ELayer
from launch.engine import compiling
from model.block import Block
from model.config import ModelConfig
from model.gpt_neox import GPTNeoX

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
    # A graph works on all entries, as the plain kernels do; without one the native ones would run.
    kernels: Literal["plain", "auto"] = "plain" if backend is None else "auto"
    l2e = L2EConfig(
        layers=[1, 2, 3], late_start_step=2, weight=1.0, inhibit_fraction=0.1, kernels=kernels
    )
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


def test_training_validating_and_scoring_make_four_graphs(one_process):
    """Ten shapes of scoring would each make one more, and end the run at the ninth."""
    l2e = L2EConfig(layers=[1, 2, 3], late_start_step=2)
    model = GPTNeoX(CONFIG, l2e, seed=0)
    inhibitors = [m for m in model.modules() if isinstance(m, L2ELayer)]
    controller = Controller(inhibitors, l2e)
    counter = CompileCounterWithBackend("aot_eager")
    compiling.compile_blocks(model.gpt_neox.layers, CONFIG, CPU, torch.float32, counter)
    probe = counter.frame_count
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int, batch: int = 2) -> torch.Tensor:
        return torch.randint(256, (batch, length), generator=generator)

    def steps() -> None:
        model.train()
        for _ in range(3):
            model(tokens(16), tokens(16)).backward()
            controller.step()

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            model(tokens(16), tokens(16))

    def score() -> list[torch.Tensor]:
        model.eval()
        with torch.no_grad(), compiling.uncompiled():
            return [model.gpt_neox(tokens(5 + n, 1 + n % 3)) for n in range(10)]

    steps()
    validate()
    made = counter.frame_count
    assert made - probe <= 4
    assert [len(states) for states in score()] == list(range(5, 15))
    steps()
    validate()
    assert counter.frame_count == made


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "not compiled: train.compile is 'auto', which is for GPUs, not cpu"),
        (["train.compile=false"], "not compiled: train.compile is false"),
    ],
)
def test_on_a_cpu_nothing_is_compiled_unless_asked(overrides, said):
    config = configs.load(Path(configs.__file__).parent / "demo.json", overrides)
    assert compiling.compile_as_asked(torch.nn.Linear(1, 1), config, CPU) == said


def test_auto_goes_without_where_it_cannot_be():
    demo = Path(configs.__file__).parent / "demo.json"
    config = configs.load(demo, ["deepspeed.zero_optimization.stage=3"])
    said = compiling.compile_as_asked(torch.nn.Linear(1, 1), config, torch.device("cuda"))
    assert said.startswith("not compiled: not with ZeRO-3")


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
