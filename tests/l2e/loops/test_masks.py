"""Samples that do not count: masks, and padding without one."""

import dataclasses

import pytest
import torch
from torch import nn

import l2e
from l2e import L2EConfig
from tests.l2e.loops.twin import (
    CONFIG,
    assert_same_gradients,
    batches,
    network,
    no_warnings,
    observed,
)


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
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :3], attention_mask=torch.arange(32) < 20)
    with pytest.raises(ValueError, match="called outside"):  # also after a pass that broke off
        model.inner(x)


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
    with no_warnings():
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
    with no_warnings():
        model(x, attention_mask=mask)
    mask[0, 3:] = 0
    with pytest.warns(UserWarning, match='mask="attention_mask"'):
        model(x, mask)
    with no_warnings():
        model(x, attention_mask=mask)
