"""The plain loop, and what a handle says and does whatever the loop."""

import collections
import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import l2e
from l2e import L2EConfig
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_gradients,
    assert_same_statistics,
    batches,
    network,
    train_both,
)


def loss_of(model, x):
    return model(x).square().mean()


def observed(config=CONFIG, steps=4, **keys):
    """A small network whose handle has its tau, and a batch."""
    model = network()
    handle = l2e.attach(model, "1", config, **keys)
    for x in batches(steps):
        (loss_of(model, x) + handle.loss()).backward()
        handle.step()
    return model, handle, batches(1, seed=9)[0]


@pytest.mark.parametrize("scale_invariant", [False, True])
def test_training_equals_the_reference(scale_invariant):
    model = network()
    twin = Twin(model, ["1"], scale_invariant=scale_invariant)
    config = dataclasses.replace(CONFIG, scale_invariant=scale_invariant)
    handle = l2e.attach(model, "1", config)
    assert train_both(model, twin, handle, batches(12), loss_of)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU(inplace=True), nn.Softmax(-1), nn.Identity()])
def test_functions_that_keep_their_result_for_the_backward_pass(act):
    model = nn.Sequential(nn.Linear(4, 16), act, nn.Linear(16, 3)).train()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)
    assert train_both(model, twin, handle, batches(8), loss_of)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_measuring_changes_nothing(inject, dtype):
    """A measured step compares gradients, for which it takes the dense way."""
    found = []
    for measured in (False, True):
        model = network().to(dtype)
        handle = l2e.attach(model, "1", CONFIG, inject=inject)
        handle.controller.measure = measured
        for x in batches(6):
            model.zero_grad()
            (loss_of(model, x.to(dtype)) + handle.loss()).backward()
            handle.step()
        found.append(([p.grad for p in model.parameters()], handle.state_dict()))
    (plain, state), (other, other_state) = found
    tolerance = 2**-6 if dtype is torch.bfloat16 else 0.0  # rounded once or twice
    for mine, theirs in zip(plain, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance / 10)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def kept_bytes(model, x):
    """Of all tensors that autograd keeps for the backward pass, each storage once."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    return sum(sizes.values()), out


@pytest.mark.parametrize("layers", [1, 4])
def test_no_activation_is_kept_beside_autograds_own(layers):
    """Only what is selected is: 2 % of the entries, with their places."""
    blocks = [m for _ in range(layers) for m in (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))]
    model = nn.Sequential(*blocks).train()
    x = torch.randn(500, 64)
    plain, _ = kept_bytes(model, x)
    handle = l2e.attach(model, "*[147]", CONFIG)
    for _ in range(4):
        (model(x).mean() + handle.loss()).backward()
        handle.step()
    kept, _ = kept_bytes(model, x)
    share = handle.metrics()["1"]["selected_fraction"]
    assert share > 0
    activations = layers * 500 * 256 * 4
    assert kept - plain < 6 * share * activations + 1000 * layers


def test_loss_is_the_same_until_the_next_forward():
    model, handle, x = observed()
    task = loss_of(model, x)
    first = handle.loss()
    assert first.item() != 0
    assert handle.loss().item() == first.item()
    (task + first).backward()
    assert handle.loss().item() == first.item()
    handle.step()
    assert handle.loss().item() == first.item()
    model(2 * x)
    assert handle.loss().item() != first.item()


@pytest.mark.parametrize("logging", [torch.no_grad, torch.inference_mode])
def test_a_loss_that_is_logged_first_still_inhibits(logging):
    model = network()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)

    def logged(module, x):
        loss = loss_of(module, x)
        with logging():
            float(handle.loss())
        return loss

    assert train_both(model, twin, handle, batches(6), logged)


def test_a_validation_loss_has_no_l_ms():
    model, handle, x = observed()
    loss_of(model, x)
    trained = handle.loss().item()
    model.eval()
    assert handle.loss().item() == trained != 0
    with torch.no_grad():
        model(x)
    assert handle.loss().item() == 0
    loss_of(model.train(), x)
    loss_of(model.eval(), x)
    assert handle.loss().item() == trained  # of the training pass before
    model.train()
    assert handle.loss().item() == trained


@pytest.mark.parametrize("act", [nn.GELU(), nn.Unflatten(1, (16,))])  # a view is served otherwise
def test_a_second_backward_pass_would_inject_twice(act):
    model = network()
    model[1] = act
    l2e.attach(model, "1", CONFIG, inject=True)
    loss = loss_of(model, batches(1)[0])
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"layer 1: a second backward pass .*handle\.loss\(\)"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["rows", "view", "masked", "measured"])
def test_the_default_dtype_is_not_the_methods(dtype, kind):
    model = network()
    if kind == "view":
        model[1] = nn.Unflatten(1, (16,))
    twin, inputs = Twin(model, ["1"]), batches(6)
    try:
        torch.set_default_dtype(dtype)
        handle = l2e.attach(model, "1", CONFIG)
        handle.controller.measure = kind == "measured"
        if kind == "masked":
            handle.mask(torch.ones(32, dtype=torch.bool))
        for x in inputs:
            (loss_of(model, x) + handle.loss()).backward()
            handle.step()
        state = handle.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in state.values()} == {torch.int64, torch.float32}
    for x in inputs:
        twin.model(x)
        twin.pull()
        twin.step()
    assert_same_statistics(handle, twin)


def test_a_discarded_batch_leaves_no_trace():
    states = []
    for bad in (None, float("nan"), 1e3):
        model, handle, x = observed()
        if bad is not None:
            model(bad * x)
            handle.discard()
        model(x)
        handle.step()
        handle.metrics()
        states.append(handle.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_a_discarded_first_batch_takes_its_centre_with_it():
    model = network()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)
    model(batches(1)[0] * 1e5)
    handle.discard()
    assert train_both(model, twin, handle, batches(6), loss_of)


@pytest.mark.parametrize("first_call", [0, 3])
def test_a_large_mean_costs_no_precision(first_call):
    model = nn.Sequential(nn.Identity(), nn.Identity()).train()
    handle = l2e.attach(model, "?", CONFIG)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(first_call + 4):
        x = 10_000 + torch.randn(256, 8, generator=generator)
        model[0](x)
        if step >= first_call:
            model[1](x)
            seen.append(x.double())
        handle.step()
    expected = torch.cat(seen).var(0)
    found = handle.state_dict()["1.var"].double()
    assert ((found - expected).abs() / expected).max() < 1e-4


@pytest.mark.parametrize("delta", [-1.0, 0.0, 0.5, 5.0])
@pytest.mark.parametrize("neuron_dim", [-1, 1])
def test_deactivated_entries_are_means_with_a_gradient_of_their_own(delta, neuron_dim):
    config = dataclasses.replace(CONFIG, method="deactivate", delta=delta)
    torch.manual_seed(0)
    first, x = {
        -1: (nn.Linear(4, 16), torch.randn(64, 4)),
        1: (nn.Conv2d(3, 6, 3), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)),
    }[neuron_dim]
    model = nn.Sequential(first, nn.GELU()).train()
    handle = l2e.attach(model, "1", config, neuron_dim=neuron_dim)
    for _ in range(4):
        model(torch.randn_like(x))
        handle.step()
    state = {name: tensor.double() for name, tensor in handle.state_dict().items()}
    mean, var, tau = (state[f"1.{name}"] for name in ("mean", "var", "tau"))
    x.mul_(1.3).requires_grad_()
    with handle.paused():
        plain = model(x)
    z = plain.double().movedim(neuron_dim, -1)
    chosen = (z - mean) ** 2 / (var + config.eps * var.mean()) >= tau
    assert 5 < chosen.sum() < chosen.numel() / 4
    expected = torch.where(chosen, mean, z).movedim(-1, neuron_dim)
    factor = torch.where(chosen, -delta, 1.0).movedim(-1, neuron_dim)
    out, arriving = model(x), torch.randn(plain.shape)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    [found] = torch.autograd.grad(out, x, arriving)
    [wanted] = torch.autograd.grad(plain, x, (arriving * factor).float())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "each"), [("none", 0), ("regularize", 8), ("deactivate", 4)])
def test_memory_for_the_backward_pass_is_that_of_the_selected_entries(method, each):
    """So many bytes for each, and one entry, beside what autograd keeps without the method."""
    model = network(units=64)
    handle = l2e.attach(model, "1", dataclasses.replace(CONFIG, method=method))
    for x in batches(5, rows=256):
        (loss_of(model, x) + handle.loss()).backward()
        handle.step()

    def kept():
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x).sum()
        return sum(storage.nbytes() for storage in storages.values())

    with handle.paused():
        plain = kept()
    added = kept() - plain
    handle.step()
    selected = handle.metrics()["1"]["selected_fraction"] * 256 * 64
    assert selected > 100
    assert added == pytest.approx(each * selected + (4 if each else 0), abs=1)


# Passes that are not training.


@pytest.mark.parametrize("passing", ["paused", "no_grad", "inference", "eval"])
def test_passes_that_are_not_training_are_neither_counted_nor_changed(passing):
    config = dataclasses.replace(CONFIG, method="deactivate")
    model, handle, x = observed(config)
    other, plain = copy.deepcopy(model), observed(config)
    inside = {
        "paused": handle.paused,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "eval": torch.enable_grad,
    }[passing]
    model.train(passing != "eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = other(x)
    with inside():
        assert torch.equal(model(x), expected)
    model.train()
    assert not torch.equal(model(x), expected)
    handle.step()
    plain_model, plain_handle, _ = plain
    plain_model(x)
    plain_handle.step()
    state, expected_state = handle.state_dict(), plain_handle.state_dict()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_count_where_asked(inside):
    model = network()
    handle = l2e.attach(model, "1", CONFIG, observe_no_grad=True)
    with inside():
        model(batches(1)[0])
    handle.step()
    assert float(handle.state_dict()["1.samples"]) == 32
    (loss_of(model, batches(1)[0]) + handle.loss()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_count_once(reentrant):
    found = []
    for checkpointed in (False, True):
        model = network()
        handle = l2e.attach(model, "1", CONFIG, inject=True)
        for x in batches(4):
            model.zero_grad()
            x.requires_grad_()
            out = (
                torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
                if checkpointed
                else model(x)
            )
            out.square().mean().backward()
            handle.step()
        found.append((model, handle.state_dict()))
    (plain, state), (other, other_state) = found
    assert float(state["1.tau"]) > 0
    assert_same_gradients(other, plain, 1e-6)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


def test_reentrant_checkpointing_without_injection_is_refused():
    model = network()
    l2e.attach(model, "1", CONFIG)
    x = batches(1)[0].requires_grad_()
    with pytest.raises(ValueError, match=r"module 1 .*reentrant.*use_reentrant=False, or"):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)


# Nothing observed, and loss() forgotten.


def test_modules_that_nothing_reaches_are_named():
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "c": nn.Linear(4, 8)})
    model["b"].eval()
    handle = l2e.attach(model, "?", CONFIG)
    for module in ("a", "b"):
        model[module](batches(1)[0])
    with pytest.warns(UserWarning, match=r"b in eval mode.*c never called.*all 3 matched"):
        handle.step()
    metrics = handle.metrics()
    assert list(metrics) == ["a", "b", "c"]
    assert metrics["c"].keys() == metrics["a"].keys()
    assert all(value != value for value in metrics["b"].values())
    saved = handle.state_dict()
    handle.detach()
    restored = l2e.attach(model, "?", CONFIG)
    restored.load_state_dict(saved)
    assert restored.state_dict().keys() == saved.keys()


@pytest.mark.parametrize("inject", [False, True])
def test_what_is_frozen_is_told_once(inject):
    model = nn.Sequential(nn.Linear(4, 4), network()).train()
    model[:1].requires_grad_(False)
    handle = l2e.attach(model, "0", CONFIG, inject=inject)

    def train():
        for x in batches(3):
            (loss_of(model, x) + handle.loss()).backward()
            handle.step()

    with pytest.warns(UserWarning, match=r"before module 0, .*no gradient.*Unfreeze") as told:
        train()
    assert len(told) == 1


def test_a_step_without_a_pass_is_told_once():
    model, handle, x = observed()

    def train():
        for _ in range(3):
            (loss_of(model, x) + handle.loss()).backward()
            handle.step()
            handle.step()

    with pytest.warns(UserWarning, match=r"no attached module was called.*after each") as told:
        train()
    assert len(told) == 1


def test_a_model_left_in_eval_mode_is_told_once():
    model = network()
    handle = l2e.attach(model, "1", L2EConfig(method="none", layers="all"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in batches(2):
            model(x)
            handle.step()
    model.eval()  # to validate; and then forgotten

    def go_on():
        for x in batches(3):
            model(x)
            handle.step()

    with pytest.warns(UserWarning, match=r"in eval mode.*model\.train") as told:
        go_on()
    assert len(told) == 1


def test_a_loss_that_is_never_taken_is_told():
    model = network()
    handle = l2e.attach(model, "1", CONFIG)

    def train():
        for x in batches(4):
            model(x)
            handle.step()

    with pytest.warns(UserWarning, match=r"handle\.loss\(\) was not called"):
        train()


def test_without_surprises_there_are_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for keys in ({}, {"inject": True}):
            observed(steps=15, **keys)


# Masks.


@pytest.mark.parametrize("selection", ["threshold", "topk"])
@pytest.mark.parametrize("method", ["regularize", "deactivate", "none"])
@pytest.mark.parametrize("kind", ["argument", "positional", "given", "images"])
def test_masked_entries_change_nothing(kind, method, selection):
    """The same statistics and gradients as without the padding, which passes as it is.

    What a Linear gives three dimensions is a view, and inhibited densely; what Tanh gives is none.
    """

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            last = nn.Tanh() if kind in ("given", "images") else nn.Identity()
            self.inner = nn.Sequential(nn.Linear(4, 16), last)
            self.head = nn.Linear(16, 3)

        def forward(self, x, attention_mask=None):
            z = self.inner(x)
            return self.head(z if kind != "images" else z.movedim(1, -1))

    def widen(module, args, z):
        return z.movedim(-1, 1).contiguous()

    config = dataclasses.replace(CONFIG, method=method, selection=selection)
    argument = "attention_mask" if kind in ("argument", "positional") else None
    neuron_dim = 1 if kind == "images" else -1
    results = []
    for masked in (True, False):
        model = Masked().train()
        if kind == "images":
            model.inner.register_forward_hook(widen)
        handle = l2e.attach(
            model, "inner", config, mask=argument if masked else None, neuron_dim=neuron_dim
        )
        generator = torch.Generator().manual_seed(3)
        for _ in range(6):
            model.zero_grad()
            x = torch.randn(4, 10, 4, generator=generator)
            mask = torch.arange(10) < torch.tensor([[10], [7], [3], [1]])
            x[~mask] = 50.0
            if masked:
                if kind in ("given", "images"):
                    handle.mask(mask if kind == "given" else mask[:, None].float())
                if kind == "argument":
                    out = model(x, attention_mask=mask.long())
                else:
                    out = model(x, *([mask.long()] if kind == "positional" else []))
                padding = out[~mask]
                assert torch.equal(padding, padding[:1].expand_as(padding))
                out = out[mask]
            else:
                rows = x[mask]
                out = model(rows[None, :, :])[0]
            (out.square().mean() + handle.loss()).backward()
            handle.step()
        results.append((model, handle))
    (model, handle), (plain, plain_handle) = results
    assert_same_gradients(model, plain)
    state = plain_handle.state_dict()
    for name, value in handle.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)


def test_masks_that_do_not_fit_are_refused():
    model, handle, _ = observed()
    for mask, message in (
        (torch.ones(31), r"shape \[31\] for samples of shape \[32\]"),
        (torch.ones(32, 2), "for samples of shape"),
        (torch.full((32,), -1e9), "other values than 0 and 1"),
    ):
        handle.mask(mask)
        with pytest.raises(ValueError, match=message):
            model(batches(1)[0])
    with pytest.raises(ValueError, match=r"no such argument.*handle.mask"):
        l2e.attach(model, "0", CONFIG, mask="attention_mask")


def test_a_mask_of_another_pass_is_not_taken():
    """A part that is called by itself has no argument of the model's."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, attention_mask=None, again=False):
            return self.forward(x) if again else self.inner(x)

    model = Masked().train()
    handle = l2e.attach(model, "inner.1", CONFIG, mask="attention_mask")
    x = batches(1)[0]
    model(x, attention_mask=torch.arange(32) < 20)
    with pytest.raises(ValueError, match=r"inner\.1 is called outside .*handle\.mask"):
        model.inner(x)
    with handle.paused():
        model.inner(x)
    model(x, attention_mask=torch.arange(32) < 5, again=True)
    handle.step()
    assert handle.state_dict()["inner.1.samples"] == 25


def test_an_encoders_mask_is_not_the_decoders():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = network(), network()

        def forward(self, x, attention_mask=None, decoder_attention_mask=None):
            return self.encoder(x) + self.decoder(x)

    model = Both()
    for pattern, mask, wrong in (
        ("*.1", "attention_mask", "decoder.1"),
        ("*.1", "decoder_attention_mask", "encoder.1"),
        ("decoder.1", "attention_mask", "decoder.1"),
    ):
        with pytest.raises(ValueError, match=rf"than those of {wrong}: .*of their own, with mask="):
            l2e.attach(model, pattern, CONFIG, mask=mask)
    l2e.attach(model, "encoder.1", CONFIG, mask="attention_mask")
    l2e.attach(model, "decoder.1", CONFIG, mask="decoder_attention_mask")


def test_a_mask_that_is_true_at_padding_is_refused():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    with pytest.raises(ValueError, match=r"opposite.*handle\.mask\(~src_key_padding_mask\)"):
        l2e.attach(encoder, "layers.*.linear1", CONFIG, mask="src_key_padding_mask")


def test_a_mask_that_no_pass_is_given_is_told_once():
    """A forward that takes any keyword cannot refuse a wrong name at attach."""

    class Lenient(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x, **anything):
            return self.act(x)

    model = Lenient()
    handle = l2e.attach(model, "act", L2EConfig(method="none", layers="all"), mask="padding")

    def train(**given):
        for x in batches(3):
            model(x, **given)
            handle.step()

    with pytest.warns(UserWarning, match=r"mask = 'padding' is not among .*\(mask\)") as told:
        train(mask=None)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(padding=None)


def test_padding_is_told_once():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 8)

        def forward(self, x, attention_mask=None):
            return self.inner(x)

    model = Reads().train()
    l2e.attach(model, "inner", CONFIG)
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, attention_mask=mask)
    mask[0, 3:] = 0
    with pytest.warns(UserWarning, match='mask="attention_mask"'):
        model(x, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, attention_mask=mask)


# Kinds of output.

Pair = collections.namedtuple("Pair", "hidden extra")


@dataclasses.dataclass
class Fields:
    count: int
    hidden: torch.Tensor


OUTPUTS = {
    "tuple": (lambda y: (None, y), lambda o: o[1], {}),
    "nested": (lambda y: ((torch.tensor(1), [y]),), lambda o: o[0][1][0], {}),
    "namedtuple": (lambda y: Pair(2 * y, y), lambda o: o.extra, {"output": "extra"}),
    "list": (lambda y: [y, 2 * y], lambda o: o[1], {"output": -1}),
    "dict": (lambda y: {"loss": y.mean(), "h": y}, lambda o: o["h"], {"output": "h"}),
    "dict by number": (lambda y: {"n": 3, "h": y}, lambda o: o["h"], {"output": 1}),
    "ordered": (lambda y: collections.OrderedDict(h=y), lambda o: o["h"], {}),
    "dataclass": (lambda y: Fields(3, y), lambda o: o.hidden, {}),
    "maximum": (lambda y: y[..., None].max(-1), lambda o: o.values, {}),
    "packed": (
        lambda y: pack_padded_sequence(y[None], [len(y)], batch_first=True),
        lambda o: o.data,
        {},
    ),
}


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.make = nn.Linear(4, 6), make

    def forward(self, x):
        return self.make(self.inner(x))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_keep_their_type_with_the_tensor_replaced(kind):
    make, get, keys = OUTPUTS[kind]
    plain = Returns(make).train()
    model = nn.ModuleDict({"a": copy.deepcopy(plain)}).train()
    l2e.attach(model, "a", dataclasses.replace(CONFIG, method="silence"), **keys)
    x = torch.randn(5, 4)
    found, expected = model["a"](x), plain(x)
    assert type(found) is type(expected)
    assert torch.equal(get(found), torch.zeros(5, 6))
    if kind == "packed":
        assert isinstance(found, PackedSequence)
        assert torch.equal(found.batch_sizes, expected.batch_sizes)


def test_a_tensor_that_is_there_twice_is_replaced_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            last = self.inner(x)
            return {"last": last, "all": (x, last)}

    model = nn.ModuleDict({"twice": Twice()}).train()
    l2e.attach(model, "twice", dataclasses.replace(CONFIG, method="silence"))
    x = batches(1)[0]
    out = model["twice"](x)
    assert out["all"][1] is out["last"]
    assert not out["last"].any()
    assert out["all"][0] is x


def test_model_outputs_by_name():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=9,
    )
    model = nn.ModuleDict({"bert": BertModel(config)}).train()
    silent = dataclasses.replace(CONFIG, method="silence")
    l2e.attach(model, "bert", silent, output="last_hidden_state")
    out = model["bert"](torch.tensor([[1, 2, 3]]))
    assert type(out).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert torch.equal(out.last_hidden_state, torch.zeros(1, 3, 8))
    assert torch.equal(out["last_hidden_state"], out.last_hidden_state)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda y: None, "NoneType"),
        (lambda y: y.long(), "torch.int64"),
        (lambda y: y > 0, "torch.bool"),
        (lambda y: torch.complex(y, y), "torch.complex64"),
        (lambda y: y.mean(), r"shape \[\]"),
        (lambda y: {"a": "text", "b": y.int()}, r"dict \(a: str, b: Tensor\)"),
        (lambda y: y.relu().to_sparse(), "torch.sparse_coo"),
    ],
)
def test_outputs_without_neurons_are_refused(make, found):
    model = nn.ModuleDict({"a": Returns(make)}).train()
    l2e.attach(model, "a", CONFIG)
    with pytest.raises(ValueError, match=rf"module a .*{found}"):
        model["a"](torch.randn(5, 4))


def test_a_part_that_is_not_there_is_refused():
    model = nn.ModuleDict({"a": Returns(lambda y: {"h": y})}).train()
    l2e.attach(model, "a", CONFIG, output="hidden")
    with pytest.raises(ValueError, match=r"module a has no output 'hidden', it returned dict \(h"):
        model["a"](torch.randn(5, 4))


# Memory formats, views and places.


@pytest.mark.parametrize("method", ["none", "regularize", "deactivate"])
def test_outputs_keep_strides(method):
    config = dataclasses.replace(CONFIG, method=method)
    inputs = {
        "images": torch.randn(2, 3, 8, 8),
        "channels last": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        "transposed": torch.randn(8, 3, 8, 2).transpose(0, 3),
    }
    for x in inputs.values():
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).train()
        expected = model(x)
        l2e.attach(model, "1", config, neuron_dim=1)
        found = model(x)
        assert found.stride() == expected.stride()
        found.sum().backward()
    tokens = nn.Sequential(nn.Identity()).train()
    l2e.attach(tokens, "0", config)
    x = torch.randn(3, 4, 5).transpose(0, 1)
    assert tokens(x).stride() == x.stride()
    assert (tokens(x) is x) == (method != "deactivate")


@pytest.mark.parametrize("method", ["none", "regularize", "deactivate"])
def test_successors_may_work_in_place(method):
    def successors(y):
        y += 1
        y[:, 0] = 0
        return nn.functional.relu(y, inplace=True)

    config = dataclasses.replace(CONFIG, method=method, weight=0.0, late_start_step=100)
    gradients = []
    for attached in (False, True):
        model = network()
        if attached:
            l2e.attach(model, "0", config)
        successors(model[0](batches(1)[0])).square().sum().backward()
        gradients.append(model[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_operators_pass_torchs_own_checks():
    from l2e import inhibition

    for config in (CONFIG, dataclasses.replace(CONFIG, method="deactivate", selection="topk")):
        layer = l2e.L2ELayer(None, config, activation=None, name="0", inhibited_layers=1)
        controller = l2e.Controller([layer], config)
        shapes = [torch.randn(6, 5), torch.randn(2, 3, 4, 5).movedim(1, -1)]
        for x in shapes:
            layer.state.allocate(x.shape[-1], 1, x.device)
            for _ in range(3):
                layer.operate(x)
                controller.step()
            keep_mask = config.selection == "topk"
            for counted in (None, torch.ones(x.shape[:-1])):
                arguments = (x.requires_grad_(), None, counted, layer.handle, keep_mask, -1)
                torch.library.opcheck(inhibition.inhibit, arguments)
                torch.library.opcheck(inhibition.observe, (x.detach(), counted, layer.handle, -1))


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


# Arguments.


def test_arguments_that_do_not_fit_are_refused():
    shared = nn.GELU()
    twice = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(4, 8), shared), "b": nn.Sequential(nn.Linear(8, 8), shared)}
    )
    for model, pattern, config, message in (
        (network(), "", CONFIG, "pattern = ''"),
        (network(), ["0", "1"], CONFIG, r"pattern = \['0', '1'\]"),
        (network(), "1", {"weight": 1.0}, r"config is dict.*L2EConfig\(\*\*keys\)"),
        (twice, "a.1", CONFIG, "one module serves as a.1, b.1"),
    ):
        with pytest.raises(ValueError, match=message):
            l2e.attach(model, pattern, config)
    for key in ("weight", "eps", "delta"):
        with pytest.raises(ValueError, match=key):
            L2EConfig(**{key: float("inf")})


def test_an_alias_of_a_module_is_no_second_place():
    model = nn.ModuleDict({"inner": network()})
    model["alias"] = model["inner"]
    handle = l2e.attach(model, "*.1", CONFIG)
    assert handle.names == ["inner.1"]
    handle.detach()
    assert l2e.attach(model, "alias.1", CONFIG).names == ["alias.1"]


@pytest.mark.parametrize(
    ("module", "shape", "neuron_dim", "message"),
    [
        (nn.Conv2d(3, 6, 3), (2, 3, 9, 9), -1, "module 0 has 6 neurons.*neuron_dim = 1"),
        (nn.Linear(4, 8), (2, 5, 4), 1, "module 0 has 8 neurons.*neuron_dim = 2"),
        (nn.Identity(), (2, 5), 2, r"shape \[2, 5\], which has no dimension neuron_dim = 2"),
        # Which dimension it is cannot be seen, and is asked for.
        (nn.Conv2d(3, 6, 3), (2, 3, 9, 9), None, r"module 0: .*\[2, 6, 7, 7\].*neuron_dim = 1"),
        (nn.Conv1d(3, 6, 3), (2, 3, 8), None, r"module 0: .*\[2, 6, 6\].*neuron_dim = 1"),
        (nn.Conv1d(3, 6, 3), (3, 8), None, r"module 0: .*\[6, 6\].*neuron_dim"),
        (nn.BatchNorm2d(3), (2, 3, 3, 3), None, r"module 0: .*\[2, 3, 3, 3\].*neuron_dim = 1"),
        (nn.GELU(), (2, 6, 7, 7), None, "tell attach which dimension.*-1 for the last"),
        (nn.Upsample(scale_factor=2), (2, 3, 4, 5, 6), None, "tell attach which dimension"),
    ],
)
def test_a_wrong_neuron_dim_is_refused(module, shape, neuron_dim, message):
    model = nn.Sequential(module).train()
    l2e.attach(model, "0", CONFIG, neuron_dim=neuron_dim)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


@pytest.mark.parametrize("moved", [False, True])
def test_an_activation_behind_a_convolution_is_asked_for_its_channels(moved):
    """[batch, channels, length] looks like [batch, sequence, neurons]."""

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
            self.acts = nn.Sequential(nn.ReLU(), nn.Dropout(0.1), nn.GELU())

        def forward(self, x):
            x = 1 + self.norm(self.conv(x))
            x = x + x.mean(2, keepdim=True)
            return self.acts(x.transpose(1, 2) if moved else x)

    model = Convolution().train()
    handle = l2e.attach(model, "acts.2", CONFIG)
    if moved:
        model(torch.randn(2, 3, 10))
        handle.step()
        assert handle.state_dict()["acts.2.mean"].shape == (6,)
    else:
        with pytest.raises(ValueError, match=r"\[2, 6, 8\]: tell attach which dimension"):
            model(torch.randn(2, 3, 10))


def test_a_module_of_ones_own_may_say_other_widths():
    """transformers' patch embeddings have num_channels, those of the image."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_channels = 3
            self.projection = nn.Conv2d(3, 16, 4, 4)

        def forward(self, images):
            return self.projection(images).flatten(2).transpose(1, 2)

    model = nn.Sequential(Patches()).train()
    images = torch.randn(2, 3, 8, 8)
    asked = l2e.attach(model, "0", CONFIG)
    with pytest.raises(ValueError, match=r"\[2, 4, 16\].*-1 for the last"):
        model(images)
    asked.detach()
    handle = l2e.attach(model, "0", CONFIG, neuron_dim=-1)
    model(images)
    handle.step()
    assert handle.state_dict()["0.mean"].shape == (16,)


def test_widths_that_change_are_refused():
    model = nn.Sequential(nn.Identity()).train()
    l2e.attach(model, "0", CONFIG)
    model(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"layer 0: .*6 units after 5.*neuron_dim"):
        model(torch.randn(3, 6))


def test_a_state_fits_whatever_prefix_wraps_the_model():
    model, handle, _ = observed()
    state = handle.state_dict()
    handle.detach()
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"net": model})})
    outer = l2e.attach(wrapped, "*.1", CONFIG)
    outer.load_state_dict(state)
    saved = outer.state_dict()
    outer.detach()
    back = l2e.attach(model, "1", CONFIG)
    back.load_state_dict(saved)
    for name, value in back.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match="layers 1: this handle's are 0"):
        l2e.attach(model, "0", CONFIG).load_state_dict(state)
    with pytest.raises(ValueError, match=r"layer 1: no entries mean, .*distributed checkpoint"):
        back.load_state_dict({"step": state["step"], "1.samples": state["1.samples"]})


def test_a_state_of_two_parts_is_not_guessed_from():
    both = nn.ModuleDict({"encoder": network(0), "decoder": network(1)})
    handle = l2e.attach(both, "*.1", CONFIG)
    for part in both.values():
        part(batches(1)[0])
    handle.step()
    state = handle.state_dict()
    alone = l2e.attach(network(), "1", CONFIG)
    with pytest.raises(ValueError, match=r"could be those under decoder\. or encoder\."):
        alone.load_state_dict(state)
    del state["decoder.1.samples"]
    alone.load_state_dict({n: v for n, v in state.items() if not n.startswith("decoder")})
    assert torch.equal(alone.state_dict()["1.mean"], state["encoder.1.mean"])
