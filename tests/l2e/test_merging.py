"""What becomes of a step's end where torch.compile is used, right or wrong."""

import pytest
import torch

from l2e import Controller, L2EConfig, L2ELayer, merging


@pytest.fixture
def compiler(monkeypatch):
    """Stands for torch.compile on a GPU; returns what to set it by."""
    monkeypatch.setattr(merging, "compiles", lambda _: True)
    monkeypatch.setattr(merging, "agreed", set())
    monkeypatch.setattr(merging, "not_compiled", set())
    return lambda compiled: monkeypatch.setattr(merging, "compiled", compiled)


def trained() -> dict[str, torch.Tensor]:
    """The state of two layers after four steps of which two are measured."""
    config = L2EConfig(late_start_step=1)
    layers = [L2ELayer(8, config, name=str(n), inhibited_layers=2).train() for n in range(2)]
    controller = Controller(layers, config)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        controller.measure = step % 2 == 1
        pre = torch.randn(16, 8, generator=generator).requires_grad_()
        for layer in layers:
            layer(pre).sum().backward()
        controller.step()
    return controller.state_dict()


def raises(_):
    raise RuntimeError("no compiler")


def numbers_off(function):
    def compiled(*arguments):
        return torch.utils._pytree.tree_map(lambda t: t * 1.001, function(*arguments))

    return compiled


def fields_lost(function):
    """As PyTorch 2.11 does with `NamedTuple._replace`."""
    return lambda *arguments: tuple.__new__(type(function(*arguments)))


def wrong_when_measured(function):
    def compiled(*arguments):
        measured = all(argument is not None for argument in arguments)
        return (numbers_off(function) if measured else function)(*arguments)

    return compiled


WRONG = {
    raises: "no compiler",
    numbers_off: "differs by up to",
    fields_lost: "it returns",
    wrong_when_measured: "differs by up to",
}


@pytest.mark.parametrize(("wrong", "why"), WRONG.items())
def test_a_compiler_that_fails_or_errs_is_told_and_not_used(compiler, caplog, wrong, why):
    expected = trained_plainly()
    compiler(wrong)
    found = trained()
    assert "merged by plain operations" in caplog.text
    assert why in caplog.text
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_compiler_that_is_right_is_used(compiler, caplog):
    calls = []

    def right(function):
        def compiled(*arguments):
            calls.append(function.__name__)
            return function(*arguments)

        return compiled

    expected = trained_plainly()
    compiler(right)
    found = trained()
    assert calls == ["merge", "advance"] * 4
    assert not caplog.text
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def trained_plainly() -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "compiles", lambda _: False)
        return trained()
