"""The method in other people's models, by module names."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
)

import l2e
from l2e import L2EConfig
from tests import tiny_models
from tests.l2e.loops.twin import CONFIG, Twin, train_both


def gpt2():
    model = tiny_models.gpt2(n_positions=16)
    tokens = torch.randint(50, (4, 16))
    return model, "transformer.h.*.mlp.act", {"input_ids": tokens, "labels": tokens}


def llama():
    tokens = torch.randint(50, (4, 16))
    return (
        tiny_models.llama(),
        "model.layers.*.mlp.act_fn",
        {"input_ids": tokens, "labels": tokens},
    )


def bert():
    config = BertConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    inputs = {"input_ids": torch.randint(50, (4, 16)), "labels": torch.tensor([0, 1, 0, 1])}
    return BertForSequenceClassification(config), "bert.encoder.layer.*.intermediate", inputs


def swin():
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4
    )
    config.drop_path_rate = 0.0
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    return SwinForImageClassification(config), "swin.*.layers.1.blocks.*.activation_fn", inputs


class Recurrent(nn.Module):
    """A cell called at every position: the LSTM's output is a tuple."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(8, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, inputs, labels):
        state = None
        for x in inputs.unbind(1):
            state = self.cell(x, state)
        return {"loss": nn.functional.cross_entropy(self.head(state[0]), labels)}


class ConvGRUCell(nn.Module):
    """A gated recurrent cell over images [batch, channels, height, width]."""

    def __init__(self, channels=6):
        super().__init__()
        self.gates = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.candidate = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x, hidden):
        update, reset = torch.sigmoid(self.gates(torch.cat([x, hidden], 1))).chunk(2, 1)
        new = torch.tanh(self.candidate(torch.cat([x, reset * hidden], 1)))
        return (1 - update) * hidden + update * new


class Forecast(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = ConvGRUCell()

    def forward(self, inputs, labels):
        hidden = torch.zeros_like(inputs[:, 0])
        for x in inputs.unbind(1):
            hidden = self.cell(x, hidden)
        return {"loss": nn.functional.mse_loss(hidden, labels)}


def lstm():
    inputs = {"inputs": torch.randn(4, 7, 8), "labels": torch.tensor([0, 1, 0, 1])}
    return Recurrent(), "cell", inputs


def convolutional():
    inputs = {"inputs": torch.randn(2, 5, 6, 4, 4), "labels": torch.randn(2, 6, 4, 4)}
    return Forecast(), "cell", inputs


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "swin": swin,
    "lstm": lstm,
    "conv": convolutional,
}


def make(name):
    torch.manual_seed(1)
    model, pattern, inputs = MODELS[name]()
    neuron_dim = 1 if name == "conv" else -1
    return model.train(), pattern, inputs, neuron_dim


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def observed(model, handle, inputs, steps=3):
    """Steps without an optimizer: the statistics settle and tau starts."""
    for _ in range(steps):
        model(**inputs)
        handle.step()


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_the_reference(name):
    model, pattern, inputs, neuron_dim = make(name)
    names = [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]

    def output(out):
        return out[0] if isinstance(out, tuple) else out

    twin = Twin(model, names, neuron_dim, output)
    handle = l2e.attach(model, pattern, CONFIG, neuron_dim=neuron_dim)
    assert handle.names == names
    assert train_both(model, twin, handle, [inputs] * 4, lambda m, x: m(**x)["loss"])


@pytest.mark.parametrize("name", MODELS)
def test_eval_is_the_identity_and_detach_leaves_nothing(name):
    model, pattern, inputs, neuron_dim = make(name)
    config = L2EConfig(late_start_step=2, method="deactivate", layers="all")
    plain = copy.deepcopy(model)
    before = plain.train()(**inputs)["loss"]
    handle = l2e.attach(model, pattern, config, neuron_dim=neuron_dim)
    observed(model, handle, inputs)
    assert not torch.equal(model(**inputs)["loss"], before)
    assert torch.equal(model.eval()(**inputs)["loss"], plain.eval()(**inputs)["loss"])
    assert model.state_dict().keys() == plain.state_dict().keys()
    handle.detach()
    model.train()
    assert torch.equal(model(**inputs)["loss"], before)
    assert not any(module._forward_hooks for module in model.modules())


def test_config_layers_choose_among_the_matches():
    model = nn.ModuleDict({str(n): nn.GELU() for n in range(12)})
    handle = l2e.attach(model, "*", L2EConfig(layers=[10, 2]))
    assert handle.names == ["2", "10"]  # the model itself never matches
    handle.detach()
    assert l2e.attach(model, "?", L2EConfig()).names == ["4", "5"]


def test_a_pattern_that_matches_nothing_names_some_that_would():
    with pytest.raises(ValueError, match=r"no module's name matches 'h\.\*'.*transformer\."):
        l2e.attach(gpt2()[0], "h.*", CONFIG)


def test_state_is_restored_into_a_fresh_handle():
    model, pattern, inputs, _ = make("gpt2")
    handle = l2e.attach(model, pattern, CONFIG)
    observed(model, handle, inputs)
    saved = handle.state_dict()
    handle.detach()
    other = l2e.attach(model, pattern, CONFIG)
    other.load_state_dict(saved)
    for name, value in saved.items():
        assert torch.equal(other.state_dict()[name], value), name
    losses = []
    model(**inputs)
    losses.append(other.loss().item())
    assert losses[0] != 0


@pytest.mark.parametrize(("how", "tolerance"), [("checkpointed", 0.0), ("compiled", 1e-4)])
def test_recomputed_and_compiled_models_have_the_same_numbers(how, tolerance):
    """Compiled, the model is one graph."""
    found = []
    for kind in ("plain", how):
        model, pattern, inputs, _ = make("gpt2")
        if kind == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = l2e.attach(model, pattern, CONFIG)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        run = compiled if kind == "compiled" else model
        for _ in range(4):
            model.zero_grad()
            logits = run(inputs["input_ids"])["logits"]
            (logits.square().mean() + handle.loss()).backward()
            handle.step()
        found.append(gradients(model) | handle.state_dict())
    plain, other = found
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance / 100)


def test_trainer_callback_equals_adding_the_loss(tmp_path):
    data = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(50, (32, 16), generator=torch.Generator().manual_seed(3))
    ]
    trained = []
    for weight in (0.0, 0.5):
        model, pattern, _, _ = make("gpt2")
        config = L2EConfig(late_start_step=2, weight=weight, layers="all")
        handle = l2e.attach(model, pattern, config, inject=True)
        Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                optim="sgd",
                learning_rate=0.1,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                max_steps=4,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=0,
            ),
            train_dataset=data,
            callbacks=[handle.trainer_callback()],
        ).train()
        trained.append((model, handle))
    (without, _), (with_loss, handle) = trained
    assert int(handle.state_dict()["step"]) == 4
    assert handle.metrics()[handle.names[0]]["selected_fraction"] > 0
    moved = [
        (a - b).norm() / b.norm()
        for a, b in zip(with_loss.parameters(), without.parameters(), strict=True)
    ]
    assert max(moved) > 1e-3
    with pytest.raises(ValueError, match="inject=True"):
        l2e.attach(with_loss, "transformer.h.0", CONFIG).trainer_callback()
