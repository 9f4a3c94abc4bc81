"""Text generated during training, for samples or rewards, is not training."""

import pytest
import torch

import l2e
from tests import tiny_models
from tests.l2e.loops.twin import CONFIG, Twin, tokens, train_both


@pytest.mark.parametrize("kind", ["generate", "roll-out with gradients"])
def test_generating_between_steps_changes_nothing(kind):
    torch.manual_seed(0)
    model = tiny_models.gpt2(2, 16, vocab_size=32, n_positions=24).train()
    names = [f"transformer.h.{n}.mlp.act" for n in range(2)]
    twin = Twin(model, names)
    handle = l2e.attach(model, "transformer.h.*.mlp.act", CONFIG)

    def loss_of(which, ids):
        if which is model and kind == "generate":
            model.generate(ids[:, :4], max_new_tokens=3, pad_token_id=0)
        elif which is model:
            with handle.paused():
                model(ids.flip(1))
        return which(input_ids=ids, labels=ids).loss

    assert train_both(model, twin, handle, tokens(), loss_of)
