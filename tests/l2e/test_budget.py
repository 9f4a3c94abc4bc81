"""What a step on a GPU does with tensors as large as the activations, counted without a GPU.

The kernels are replaced by notes of what they were given: on a GPU each is one launch and one pass.
Beside them no operation may touch a tensor that large, and none may make the host wait. And how
many launches the controller's step is, where torch.compile fuses it.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2e import Controller, L2EConfig, L2ELayer, backends, inhibition, kernels, merging

pytest.importorskip("triton")
from l2e import triton_kernels

ROWS, NEURONS = 4096, 32
# They allocate, or look at the same memory in another way.
FREE = (
    "permute",
    "empty",
    "view",
    "reshape",
    "detach",
    "alias",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unbind",
    "as_strided",
    "t",
)
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "nanmedian",
    "median",
    "unique",
    "equal",
)


class Counter(TorchDispatchMode):
    """Names of operations that touch a large tensor, that make a GPU's host wait, and of all."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.passes, self.waits, self.all = large, [], [], []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code runs as such while it is counted."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if name not in FREE and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            self.all.append(name)
            if any(x.numel() >= self.large for x in tensors):
                self.passes.append(name)
        by_mask = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in tensors)
        if name.removesuffix("_") in WAITS or by_mask:
            self.waits.append(name)
        return result


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels that would have been launched; Triton is chosen as on a GPU."""
    found: list[str] = []

    def note(launch, kernel, *tensors, **constants):
        found.append(kernel.__name__)
        for tensor in tensors:  # something finite where a kernel would have written
            if tensor.dim() and len(tensor) == launch.programs:
                tensor.zero_()

    monkeypatch.setattr(triton_kernels.Launch, "__call__", note)
    chosen = backends.choose(L2EConfig(kernels="plain"), torch.device("cpu"), torch.float32)
    fused = replace(
        chosen,
        forward=triton_kernels.forward,
        backward=triton_kernels.backward,
        measure=triton_kernels.measure,
    )
    monkeypatch.setattr(backends, "choose", lambda *_, **__: fused)
    monkeypatch.setitem(kernels.SLICE_ENTRIES, "cpu", kernels.SLICE_ENTRIES["cuda"])
    return found


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"scale_invariant": True},
        {"method": "deactivate"},
        {"method": "none"},
        {"gradient_ratio": 0.1},
    ],
    ids=["regularize", "scale_invariant", "deactivate", "none", "gradient_ratio"],
)
def test_a_step_is_one_pass_each_way_and_waits_for_nothing(launches, measured, keys):
    config = L2EConfig(late_start_step=2, **keys)
    layer = L2ELayer(NEURONS, config, name="0", inhibited_layers=1).train()
    controller = Controller([layer], config)
    pre, bias = torch.randn(ROWS, NEURONS), torch.randn(NEURONS)
    handle = layer.handle

    def step(counter: TorchDispatchMode) -> None:
        layer.state.running.mean_var.fill_(1)  # the kernels are none, and sum nothing
        with counter:
            out, _, mask = inhibition.inhibit._init_fn(pre, bias, None, handle, False, -1)
            inhibition.inhibit_backward._init_fn(out, None, pre, bias, None, mask, handle, -1)
            controller.step()

    for _ in range(4):  # past its start
        step(Counter(ROWS * NEURONS))
    assert layer.state.selecting
    launches.clear()
    controller.measure = measured
    counter = Counter(ROWS * NEURONS)
    step(counter)
    assert launches == [
        "forward_kernel",
        *(["measure_kernel"] if measured else []),
        "backward_kernel",
    ]
    assert counter.passes == []
    # The layer's handle is a number on the host, read once a call.
    assert counter.waits == ["_local_scalar_dense"] * 2


def test_the_plain_kernels_do_not_pass(monkeypatch):
    """The counter sees what it is to forbid."""
    config = L2EConfig(late_start_step=2, kernels="plain")
    layer = L2ELayer(NEURONS, config, name="0", inhibited_layers=1).train()
    monkeypatch.setitem(kernels.SLICE_ENTRIES, "cpu", kernels.SLICE_ENTRIES["cuda"])
    pre = torch.randn(ROWS, NEURONS)
    with Counter(ROWS * NEURONS) as counter:
        inhibition.inhibit._init_fn(pre, None, None, layer.handle, False, -1)
        pre[pre > 3]
    assert len(counter.passes) > 5
    assert "index" in counter.waits


@pytest.fixture
def loops(monkeypatch) -> list[int]:
    """Calls of compiled code that would have been made: the loops over tensors in each.

    torch.compile fuses for a CPU here, into functions of one loop after the other; on a GPU each
    loop is a kernel. They are not compiled further, and compute nothing.
    """
    found: list[int] = []

    def note(self, arguments, source: str):
        loops = len(re.findall(r"^    \{$", source, re.MULTILINE))
        assert loops
        return lambda *_: found.append(loops)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", note)
    monkeypatch.setattr(merging, "compiles", lambda _: True)
    functions = merging.merge, merging.advance
    monkeypatch.setattr(merging, "agreed", {(f, m) for f in functions for m in (False, True)})
    merging.compiled.cache_clear()
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield found
    torch.compiler.reset()
    merging.compiled.cache_clear()


@pytest.mark.parametrize("layers", [2, 32])
def test_the_controllers_step_is_twenty_launches_for_any_number_of_layers(loops, layers):
    config = L2EConfig(late_start_step=2)
    inhibitors = [
        L2ELayer(NEURONS, config, name=str(n), inhibited_layers=layers).train()
        for n in range(layers)
    ]
    controller = Controller(inhibitors, config)
    controller.phase.step = 10
    for inhibitor in inhibitors:
        for _ in ("its first statistics", "its start"):
            inhibitor.state.note(usable=True, starts=inhibitor.state.may_start)
        assert inhibitor.state.selecting
    for measured in (False, True):
        controller.measure = measured
        controller.step()  # compiles
        loops.clear()
        with Counter(ROWS * NEURONS) as counter:
            controller.step()
        assert len(loops) >= 2  # merge and advance were compiled
        assert sum(loops) + len(counter.all) <= 20, (loops, counter.all)
        assert counter.waits == []
