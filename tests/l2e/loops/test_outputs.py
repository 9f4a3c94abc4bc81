"""What modules return: kinds of output, memory formats, views, work in place."""

import collections
import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import l2e
from tests.l2e.loops.twin import (
    CONFIG,
    batches,
    network,
)

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
