"""transformers.Trainer: windows of unequal length, checkpoints, and going on from them."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import l2e
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_parameters,
    assert_same_statistics,
    batches,
    network,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        return {"loss": self.net(x).square().mean()}


def train(folder, model, handle, resume=None, **settings):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=2,
        logging_strategy="no",
        **{"num_train_epochs": 3} | settings,
    )
    data = [{"x": x, "labels": 0} for x in torch.cat(batches(5, rows=8))]
    callback = handle.trainer_callback()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(
        resume_from_checkpoint=resume
    )


def reference():
    """Five batches an epoch in windows of two, two and one; three epochs."""
    twin = Twin(network(), ["1"])
    data = batches(5, rows=8)
    shares = twin.train(3 * [data[:2], data[2:4], data[4:]])
    twin.references = {"net.1": twin.references["1"]}
    return twin, {"net.1": shares["1"]}


def test_training_equals_the_reference_also_when_resumed(tmp_path):
    twin, shares = reference()
    model = Model().train()
    handle = l2e.attach(model, "net.1", CONFIG, inject=True)
    model(100 * batches(1)[0])  # of a training that was broken off
    train(tmp_path, model, handle)
    assert_same_statistics(handle, twin, shares)
    assert_same_parameters(model.net, twin.model)
    assert (tmp_path / "checkpoint-4" / "l2e.pt").is_file()
    for resume in (str(tmp_path / "checkpoint-4"), True):
        other = Model().train()
        resumed = l2e.attach(other, "net.1", CONFIG, inject=True)
        if resume is True:
            (tmp_path / "checkpoint-8" / "l2e.pt").unlink()
            (tmp_path / "checkpoint-9" / "l2e.pt").unlink()
            with pytest.raises(ValueError, match=r"resumes at step 9, but there is no l2e\.pt"):
                train(tmp_path, other, resumed, resume)
            continue
        train(tmp_path, other, resumed, resume)
        assert resumed.controller.phase.step == 9
        assert_same_statistics(resumed, twin, shares)
        assert_same_parameters(other.net, twin.model)


def test_what_a_trainer_cannot_use_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="without optimizer="):
        l2e.attach(model, "1", CONFIG, inject=True, optimizer=optimizer).trainer_callback()
