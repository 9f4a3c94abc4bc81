"""The backend of the layer's arithmetic: chosen for a reason, and every fallback visible."""

import logging
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from l2e import Controller, L2EConfig, L2ELayer, backends, native_kernels

pytest.importorskip("triton")
CPU = torch.device("cpu")
TRITON = L2EConfig(kernels="triton")


@pytest.fixture(autouse=True)
def undecided():
    """Every test decides anew."""
    backends.decide.cache_clear()
    yield
    backends.decide.cache_clear()


def fallback(caplog, config=TRITON, dtype=torch.float32) -> str:
    """The one line that a fallback to the plain backend logs."""
    with caplog.at_level(logging.WARNING, logger="l2e"):
        for _ in range(2):
            assert backends.choose(config, CPU, dtype).name == "plain"
    assert len(caplog.records) == 1
    return caplog.records[0].getMessage()


def test_plain_as_asked_for_says_nothing(caplog):
    chosen = backends.choose(L2EConfig(kernels="plain"), CPU, torch.float32)
    assert str(chosen) == "plain kernels (l2e.kernels is 'plain')"
    assert not caplog.records


@pytest.fixture
def uncompiled():
    """The native kernels are compiled anew, and again after the test."""
    native_kernels.library.cache_clear()
    yield
    native_kernels.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["none", "regularize", "deactivate"])
def test_the_default_is_native_on_a_cpu_even_where_triton_is_interpreted(
    caplog, monkeypatch, method, dtype
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = backends.choose(L2EConfig(method=method), CPU, dtype, neurons=77)
    assert str(chosen) == "native kernels (equal to plain on this machine)"
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_there_is_no_native_kernel_for_other_dtypes(dtype):
    chosen = backends.choose(L2EConfig(), CPU, dtype)
    assert str(chosen) == f"plain kernels (no native kernel for {dtype})"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "", "CC": ""}, "there is no C compiler: install gcc or clang, or name one in CC"),
        ({"CC": "no-such-compiler -m64"}, "No such file or directory: 'no-such-compiler'"),
        ({"CC": "sh -c 'echo out of disk >&2; exit 1'"}, "sh says: out of disk"),
        ({"CC": "sh -c 'exit 3'"}, "sh says: status 3"),
        ({"CC": "true"}, "cannot open shared object file"),
        ({"CC": "'"}, "No closing quotation"),
        ({"TMPDIR": "/proc"}, "/proc"),
    ],
)
def test_without_a_compiler_that_works_the_plain_ones_run(
    uncompiled, monkeypatch, environment, reason
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)  # TMPDIR is looked at again
    line = str(backends.choose(L2EConfig(), CPU, torch.float32))
    assert line.startswith("plain kernels (no native kernels: ")
    assert reason in line


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        (">= threshold", "> 2 * threshold", "selects other entries"),
        ("deviation[i] * deviation[i]", "1.001f * deviation[i] * deviation[i]", "selects other"),
        (
            "deep[1][i] += square[i]",
            "deep[1][i] += 1.001f * square[i]",
            "sums differ from plain by",
        ),
        ("1 + erff(", "1.01f + erff(", "gradient differs from plain by"),
        ("factor * values[i]", "factor", "gradient differs from plain by"),
    ],
)
def test_native_kernels_whose_numbers_are_wrong_do_not_run(
    uncompiled, monkeypatch, tmp_path, right, wrong, reason
):
    source = Path(native_kernels.__file__).with_suffix(".c").read_text()
    assert source.count(right) == 1
    (tmp_path / "native_kernels.c").write_text(source.replace(right, wrong))
    monkeypatch.setattr(native_kernels, "__file__", str(tmp_path / "native_kernels.py"))
    line = str(backends.choose(L2EConfig(), CPU, torch.float32))
    assert line.startswith("plain kernels (")
    assert reason in line


@pytest.mark.parametrize(
    ("neurons", "activation", "biased", "keys"),
    [
        (48, "gelu", True, {}),
        (256, "gelu_tanh", False, {"scale_invariant": True}),
        (77, None, True, {"method": "deactivate"}),
        (128, "gelu", False, {"method": "none"}),
    ],
)
def test_the_check_is_of_the_variant_that_runs(monkeypatch, neurons, activation, biased, keys):
    """It passes for all of them, and calls the kernels with what the run will."""
    from l2e import triton_kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = []
    right = triton_kernels.backward

    def recorded(grad, pre, arguments, loss_gradient, squares):
        seen.append((pre.shape[1], arguments.activation, arguments.bias is not None))
        assert (arguments.balance is not None) == keys.get("scale_invariant", False)
        return right(grad, pre, arguments, loss_gradient, squares)

    monkeypatch.setattr(triton_kernels, "backward", recorded)
    config = L2EConfig(kernels="triton", **keys)
    chosen = backends.choose(
        config, CPU, torch.float32, neurons=neurons, activation=activation, biased=biased
    )
    assert str(chosen) == "triton kernels (equal to plain on this device)"
    times = 2 if config.method == "regularize" else 1  # and where gradients are compared
    assert seen == times * [(neurons, activation, biased)]


def test_without_a_gpu(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a CUDA device, the activations are on cpu" in fallback(caplog)


def test_without_triton(caplog, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "l2e.triton_kernels", raising=False)
    monkeypatch.delattr("l2e.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in fallback(caplog)


def test_with_a_dtype_it_has_no_kernel_for(caplog):
    assert "no Triton kernel for torch.float64" in fallback(caplog, dtype=torch.float64)


def test_with_a_selection_it_cannot_make(caplog):
    config = L2EConfig(kernels="triton", method="deactivate", selection="topk")
    assert "topk keeps a mask" in fallback(caplog, config)


def test_when_compilation_fails(caplog, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def broken(*args):
        raise RuntimeError("ptxas died\nand went on at length")

    monkeypatch.setattr("l2e.triton_kernels.forward", broken)
    line = fallback(caplog)
    assert "RuntimeError" in line
    assert "ptxas died" in line
    assert "\n" not in line


def test_when_its_numbers_are_wrong(caplog, monkeypatch):
    from l2e import kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def wrong(*args):
        gradient, bias_gradient = kernels.backward(*args)
        return 1.01 * gradient, bias_gradient

    monkeypatch.setattr("l2e.triton_kernels.backward", wrong)
    assert "gradient differs from plain by 1.0e-02" in fallback(caplog)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"scale_invariant": True},
        {"method": "deactivate"},
        {"method": "none"},
        {"weight": None, "gradient_ratio": 0.5},
    ],
    ids=["regularize", "scale_invariant", "deactivate", "none", "gradient_ratio"],
)
def test_a_layer_trains_alike_on_both_backends(monkeypatch, keys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain, fused = (run(L2EConfig(kernels=name, **SHORT | keys)) for name in ("plain", "triton"))
    for name, wanted in plain.items():
        torch.testing.assert_close(fused[name], wanted, rtol=1e-5, atol=1e-6, msg=name)


SHORT = {"late_start_step": 1, "forget_step": 3, "inhibit_fraction": 0.1, "weight": 1.0}


def run(config: L2EConfig, steps: int = 4) -> dict[str, torch.Tensor]:
    """Gradients and state of one layer fed the same numbers."""
    generator = torch.Generator().manual_seed(0)
    layer = L2ELayer(24, config, name="0", inhibited_layers=1).train()
    bias = torch.randn(24, generator=generator).requires_grad_()
    controller = Controller([layer], config)
    results = {}
    for step in range(steps):
        pre = torch.randn(40, 24, generator=generator).requires_grad_()
        layer(pre, bias).square().sum().backward()
        controller.step()
        results[f"gradient {step}"] = pre.grad
        results[f"bias gradients up to {step}"] = bias.grad.clone()
        results[f"loss {step}"] = controller.ms_loss()
    assert backends.choose(config, CPU, torch.float32).name == config.kernels
    return results | controller.state_dict()
