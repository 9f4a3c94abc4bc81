"""What is done with an attached model beside training it: copies, other derivatives, traces."""

import copy
import dataclasses
import pickle

import pytest
import torch

from tests.l2e.loops.twin import (
    CONFIG,
    assert_same_gradients,
    network,
    observed,
)

# Copies.


def test_copies_are_not_observed_and_stay_clean():
    model, handle, x = observed()
    model.l2e_handle = handle
    teacher, unused = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        teacher(100 * x)
    assert not teacher[1]._forward_hooks
    model(x)
    handle.step()
    assert handle.state_dict()["1.mean"].abs().max() < 10
    handle.detach()
    for copied in (model, teacher, unused):
        for module in copied.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_pre_hooks_with_kwargs
    with pytest.raises(ValueError, match=r"attach to the copy.*state_dict"):
        teacher.l2e_handle.step()


def test_a_copy_that_trains_is_told_of_once():
    model, _, x = observed()
    copied = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="attach to the copy"):
        copied(x)
    shallow = copy.copy(model)
    assert torch.equal(shallow(x), model(x))
    activation = copy.copy(model[1])
    with pytest.warns(UserWarning, match="attach to the copy"):
        activation(x)


def test_models_are_saved_whole(tmp_path):
    model, handle, x = observed(dataclasses.replace(CONFIG, method="silence"))
    model.handle = handle
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    again = pickle.loads(pickle.dumps(model))
    handle.detach()
    for other in (loaded, again):
        assert torch.equal(other.eval()(x), model.eval()(x))
        with pytest.raises(ValueError, match="state_dict"):
            other.handle.metrics()


# Differentiation of other kinds.


@pytest.mark.parametrize("method", ["none", "regularize", "deactivate"])
@pytest.mark.parametrize("inject", [False, True])
def test_second_derivatives(method, inject):
    """They pass by what changes nothing, and are refused where the method has a part."""
    model, handle, x = observed(dataclasses.replace(CONFIG, method=method), inject=inject)
    model.zero_grad()
    plain = network()

    def penalty(module, extra):
        inputs = x.clone().requires_grad_()
        [gradient] = torch.autograd.grad(
            module(inputs).square().sum() + extra(), inputs, create_graph=True
        )
        return gradient.square().sum()

    refused = pytest.raises(ValueError, match=r"second derivatives.*paused")
    if method == "none" or (method == "regularize" and not inject):
        penalty(model, lambda: 0.0).backward()
        penalty(plain, lambda: 0.0).backward()
        assert_same_gradients(model, plain, 1e-6)
    if method != "none":
        with refused:
            penalty(model, handle.loss).backward()
        with refused:
            torch.autograd.grad(penalty(model, handle.loss), list(model.parameters()))


def test_function_transforms_get_a_sentence():
    model, _, x = observed()
    with pytest.raises(ValueError, match=r"module 1 runs inside torch\.func.*paused"):
        torch.func.vmap(model)(x)
    with pytest.raises(ValueError, match=r"module 1 runs inside"):
        torch.func.jvp(model, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="inside"):
        model(torch.autograd.forward_ad.make_dual(x, x))


def test_a_trace_in_training_mode_gets_a_sentence():
    model, _, x = observed()
    with pytest.raises(ValueError, match=r"module 1 is traced in training mode.*model\.eval"):
        torch.jit.trace(model, x)
    with pytest.raises(ValueError, match=r"module 1 is traced in training mode.*model\.eval"):
        torch.export.export(model, (x,))
    model.eval()
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_scripting_gets_a_sentence():
    model, handle, x = observed()
    copied = copy.deepcopy(model).eval()
    for attached in (model.eval(), copied):
        with pytest.raises(ValueError, match=r"torch\.jit\.script.*handle\.detach"):
            torch.jit.script(attached)
    copied(x)
    handle.detach()
    for scripted in (model, copied):
        assert torch.equal(torch.jit.script(scripted)(x), model(x))
