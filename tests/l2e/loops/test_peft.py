"""peft: adapters around the inhibited layers, and a state that fits the merged model."""

import pytest
import torch

import l2e
from tests import tiny_models
from tests.l2e.loops.twin import CONFIG, Twin, tokens, train_both

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("pattern", ["*.mlp.act", "*.mlp.c_fc"])
def test_adapters_train_as_the_reference_and_the_state_fits_the_merged_model(pattern):
    torch.manual_seed(0)
    gpt2 = tiny_models.gpt2(2, 16, vocab_size=32, n_positions=24)
    lora = peft.LoraConfig(r=2, target_modules=["c_fc"], lora_dropout=0.0, fan_in_fan_out=True)
    model = peft.get_peft_model(gpt2, lora).train()
    last = pattern.rpartition("*.")[2]
    twin = Twin(model, [f"base_model.model.transformer.h.{n}.{last}" for n in range(2)])
    handle = l2e.attach(model, pattern, CONFIG)
    assert handle.names == twin.names

    def loss_of(which, ids):
        return which(input_ids=ids, labels=ids).loss

    assert train_both(model, twin, handle, tokens(), loss_of)
    saved = handle.state_dict()
    handle.detach()
    merged = model.merge_and_unload()
    other = l2e.attach(merged, pattern, CONFIG)
    other.load_state_dict(saved)
    state = other.state_dict()
    for number in range(2):
        for name in ("mean", "var", "tau"):
            own = state[f"transformer.h.{number}.{last}.{name}"]
            assert torch.equal(own, saved[f"{twin.names[number]}.{name}"])
