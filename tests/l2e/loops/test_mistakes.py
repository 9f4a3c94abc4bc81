"""What is easily got wrong without a trace: it works exactly, or is told, or refused."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import l2e
from l2e import ConfigError, L2EConfig
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    batches,
    loss_of,
    network,
    no_warnings,
    train_both,
    watch,
)

OBSERVE = L2EConfig(method="none", layers="all")


# Attaching twice, and modules in several places.


@pytest.mark.parametrize("pattern", ["1", "?", "[12]"])
def test_a_module_has_one_handle(pattern):
    """A notebook's cell that is run again would count and pull twice."""
    model = network()
    first = l2e.attach(model, "1", CONFIG)
    compiled = torch.compile(model)
    for again, name in ((model, pattern), (nn.ModuleDict({"net": model}), "*.1"), (compiled, "1")):
        with pytest.raises(ValueError, match=r"has a handle already.*detach"):
            l2e.attach(again, name, OBSERVE)
    assert len(model[1]._forward_hooks) == 1  # nothing is left of what was refused
    assert not model[2]._forward_hooks
    first.detach()
    twin = Twin(model, ["1"])
    handle = l2e.attach(model, "1", CONFIG)
    assert train_both(model, twin, handle, batches(6))
    copied = copy.deepcopy(model)
    assert l2e.attach(copied, "1", CONFIG).names == ["1"]


def test_two_handles_on_parts_of_one_model_are_exact():
    """Each has its own configuration, statistics and loss."""
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 8), nn.Tanh()).train()
    twins = [Twin(model, ["1"]), Twin(model, ["3"])]
    handles = [l2e.attach(model, name, CONFIG) for name in ("1", "3")]
    for x in batches(6):
        for module in (model, *(twin.model for twin in twins)):
            module.zero_grad()
            module(x)
        losses = [handle.loss() for handle in handles]
        expected = [twin.pull() for twin in twins]
        for handle, twin, mine, theirs in zip(handles, twins, losses, expected, strict=True):
            [found] = torch.autograd.grad(mine, model[0].weight, retain_graph=True)
            wanted = torch.autograd.grad(theirs, twin.model[0].weight, allow_unused=True)[0]
            torch.testing.assert_close(found, torch.zeros(()) if wanted is None else wanted)
            handle.step()
            twin.step()


def test_two_places_of_a_sequence_are_refused():
    act = nn.GELU()
    for model in (
        nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 8), act),
        nn.ModuleDict({"acts": nn.ModuleList([act, act])}),
    ):
        with pytest.raises(ValueError, match=r"one module serves as .*, .*deepcopy"):
            l2e.attach(model, "*1", CONFIG)


class Reuses(nn.Module):
    """A residual block's single activation, behind two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.second(self.act(self.first(x))))


class Pair(nn.Module):
    """One encoder for two views: its activation is called twice, at one place."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x) + self.encoder(-x)


def test_a_shared_activation_is_told_of_once():
    model = Reuses().train()
    l2e.attach(model, "act", OBSERVE)
    with pytest.warns(UserWarning, match=r"module act has no weights.*place a module of its"):
        model(batches(1)[0])
    with no_warnings():
        model(batches(1)[0])


@pytest.mark.parametrize("kind", ["siamese", "micro-batches", "weights"])
def test_calls_at_one_place_are_samples_of_one(kind):
    if kind == "weights":  # the same weights are the same neurons wherever they stand
        layer = nn.Linear(4, 4)
        model = nn.Sequential(nn.ModuleDict({"a": layer}), nn.Identity())
        model.forward = lambda x: layer(layer(x))
        name = "0.a"
    else:
        model = Pair(network()) if kind == "siamese" else nn.ModuleDict({"encoder": network()})
        model.forward = model.forward if kind == "siamese" else lambda x: x.square().mean()
        name = "encoder.1"
    twin = Twin(model, [name])
    handle = l2e.attach(model, name, OBSERVE)
    with no_warnings():
        for x in batches(4):
            for run in (model, twin.model):
                if kind == "micro-batches":
                    for part in x.chunk(2):
                        run["encoder"](part)
                elif kind == "siamese":
                    run(x)
                else:
                    run[0]["a"](run[0]["a"](x))
            twin.pull()
            handle.step()
            twin.step()
    assert float(handle.state_dict()[f"{name}.samples"]) == twin.references[name].m


# What a pattern means.


def test_the_model_itself_and_what_is_inside_a_match_are_passed_over():
    model = nn.ModuleDict({"a": network(), "b": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match=r"'\*' also matches 3 modules inside .*a, b \(a\.0, "):
        handle = l2e.attach(model, "*", OBSERVE)
    assert handle.names == ["a", "b"]
    with pytest.raises(ValueError, match=r"Linear has no modules inside.*Sequential"):
        l2e.attach(nn.Linear(4, 4), "*", OBSERVE)


def test_a_module_that_is_replaced_is_told_of_once():
    model = network()
    handle = l2e.attach(model, "[01]", OBSERVE)
    model[0] = torch.compile(model[0], backend="eager")  # wrapped by what the method knows
    with no_warnings():
        watch(model, handle, batches(3))
    model[1] = nn.GELU()
    with pytest.warns(UserWarning, match=r"the model's 1 is no longer .*state_dict") as told:
        watch(model, handle, batches(3))
    assert len(told) == 1


# A step that nobody makes.


def train(model, handle, steps, update):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for x in batches(steps):
        (loss_of(model, x) + handle.loss()).backward()
        if update == "optimizer":
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("update", "steps"), [("optimizer", 6), ("by hand", 120)])
def test_a_forgotten_step_is_told_once(update, steps):
    model = network()
    handle = l2e.attach(model, "1", CONFIG)
    with pytest.warns(UserWarning, match=r"without handle\.step\(\).*optimizer=optimizer") as told:
        train(model, handle, steps, update)
    assert len([w for w in told if "l2e" in str(w.message)]) == 1


def test_a_handle_that_is_not_kept_is_told_of():
    model = network()
    l2e.attach(model, "1", CONFIG, inject=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def loop():
        for x in batches(4):
            loss_of(model, x).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"SGD stepped 3 times.*trainer_callback"):
        loop()


@pytest.mark.parametrize("kind", ["accumulation", "another model", "steps", "follows", "detached"])
def test_steps_in_time_are_not_told_of(kind):
    model, other = network(), network(1)
    optimizer = torch.optim.SGD((other if kind == "another model" else model).parameters(), 0.01)
    handle = l2e.attach(model, "1", CONFIG, optimizer=optimizer if kind == "follows" else None)
    if kind == "detached":
        handle.detach()
    with no_warnings():
        for number, x in enumerate(batches(24)):
            (loss_of(model, x) + handle.loss()).backward()
            if kind != "accumulation" or number % 12 == 11:
                optimizer.step()
            if kind == "steps" or (kind == "accumulation" and number % 12 == 11):
                handle.step()


def test_reminders_keep_no_model_alive():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    l2e.attach(network(), "1", CONFIG)
    before, model = dict(hooks), network()
    l2e.attach(model, "1", CONFIG)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert hooks == before  # which an optimizer may be iterating over


# Arguments of other kinds.


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mask": torch.ones(4)}, r"mask is Tensor: expected the name.*handle\.mask\(tensor\)"),
        ({"mask": True}, "mask is True: expected the name"),
        ({"neuron_dim": "channels"}, "neuron_dim is 'channels': expected the number"),
        ({"output": torch.ones(4)}, "output is Tensor: expected the key"),
        ({"optimizer": "adam"}, "optimizer is a str: expected"),
        ({"config": None}, "config is NoneType: expected an l2e.L2EConfig"),
    ],
)
def test_arguments_of_another_kind_are_refused(keys, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        l2e.attach(model, "1", **{"config": CONFIG} | keys)
    with pytest.raises(ValueError, match=r"model is 'gpt2': expected a torch\.nn\.Module"):
        l2e.attach("gpt2", "1", CONFIG)
    assert not model[1]._forward_hooks
    assert not model._forward_pre_hooks


def test_masks_of_another_kind_are_refused():
    handle = l2e.attach(network(), "1", CONFIG)
    with pytest.raises(ValueError, match=r"handle\.mask\(list\): expected a tensor"):
        handle.mask([1, 0])

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 8)

        def forward(self, x, padding=None):
            return self.inner(x)

    model = Reads()
    l2e.attach(model, "inner", CONFIG, mask="padding")
    with pytest.raises(ValueError, match="mask = 'padding': this forward pass is given a list"):
        model(torch.randn(2, 4), padding=[1, 0])


def test_unknown_keys_of_the_configuration_are_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"wieght = 1: unknown key; did you mean weight\?"):
        L2EConfig(wieght=1, foo=2)
    with pytest.raises(ConfigError, match="foo = 2: unknown key; known are method, selection"):
        L2EConfig(wieght=1, foo=2)


def test_metrics_leave_out_what_was_not_measured():
    model = network()
    handle = l2e.attach(model, "1", L2EConfig(layers="all", late_start_step=20))
    for number, x in enumerate(batches(3)):
        handle.controller.measure = number == 2
        (loss_of(model, x) + handle.loss()).backward()
        handle.step()
        expected = {"weight", "tau", "selected_fraction", "std"}
        expected |= {"mean_ms", "max_ms", "kurtosis"} if number == 2 else set()
        assert handle.metrics()["1"].keys() == expected


# Masks and pauses under activation checkpointing.


class Blocks(nn.Module):
    """Recomputes its blocks in the backward pass, as language models do; not the mask's hook."""

    def __init__(self, checkpoint):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.checkpoint = nn.Linear(4, 16), nn.Linear(16, 4), checkpoint

    def forward(self, x, mask=None):
        if not self.checkpoint:
            return self.block(x)
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    def block(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("method", ["regularize", "deactivate"])
@pytest.mark.parametrize("selection", ["threshold", "topk", "random"])
def test_masks_with_activation_checkpointing(method, selection):
    config = L2EConfig(
        late_start_step=2, weight=0.5, layers="all", method=method, selection=selection
    )
    found = []
    for checkpoint in (False, True):
        model = Blocks(checkpoint).train()
        handle = l2e.attach(model, "a", config, mask="mask")
        for x in batches(5):
            model.zero_grad()
            for part in x.view(2, 4, 4, 4):  # micro-batches, each of other lengths
                mask = part[:, :, 0] > -0.5
                (model(part, mask)[mask].square().mean() + handle.loss()).backward()
            handle.step()
        found.append(([p.grad for p in model.parameters()], handle.state_dict()))
    (plain, state), (recomputed, other) = found
    for mine, theirs in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_recomputing_a_pass_under_other_circumstances_is_refused():
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5)
    for kind in ("two masks", "paused", "no more paused"):
        model = Blocks(True).train()
        handle = l2e.attach(model, "a", CONFIG)
        first, second = (mask, mask.clone()) if kind == "two masks" else (None, None)
        handle.mask(first)
        if kind == "no more paused":
            with handle.paused():
                loss = model(x).mean()
        else:
            loss = model(x).mean()
            with handle.paused() if kind == "paused" else torch.enable_grad():
                handle.mask(second)
                loss = loss + model(2 * x).mean()
        with pytest.raises(ValueError, match=r"recomputes one of several passes.*backward\(\)"):
            loss.backward()
