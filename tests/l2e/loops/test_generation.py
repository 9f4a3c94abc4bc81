"""Text generated during training, for samples or rewards, is not training."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import l2e
from tests.l2e.loops.twin import CONFIG, Twin, train_both


@pytest.mark.parametrize("kind", ["generate", "roll-out with gradients"])
def test_generating_between_steps_changes_nothing(kind):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=24)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config).train()
    names = [f"transformer.h.{n}.mlp.act" for n in range(2)]
    twin = Twin(model, names)
    handle = l2e.attach(model, "transformer.h.*.mlp.act", CONFIG)
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 32, (4, 16), generator=generator) for _ in range(5)]

    def loss_of(which, ids):
        if which is model and kind == "generate":
            model.generate(ids[:, :4], max_new_tokens=3, pad_token_id=0)
        elif which is model:
            with handle.paused():
                model(ids.flip(1))
        return which(input_ids=ids, labels=ids).loss

    assert train_both(model, twin, handle, tokens, loss_of)
