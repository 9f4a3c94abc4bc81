"""Lightning: the handle follows the module's optimizer, and its checkpoints carry the state."""

import pytest
import torch

import l2e
from tests.l2e.loops.twin import (
    CONFIG,
    Twin,
    assert_same_parameters,
    assert_same_statistics,
    batches,
    network,
)

lightning = pytest.importorskip("lightning", reason="lightning is not installed")


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.handle = l2e.attach(self.net, "1", CONFIG, optimizer=optimizer)
        return optimizer

    def training_step(self, batch, number):
        return self.net(batch).square().mean() + self.handle.loss()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["l2e"] = self.handle.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_training_equals_the_reference(tmp_path):
    twin = Twin(network(), ["1"])
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = batches(6)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    for _ in range(2):
        for pair in zip(data[::2], data[1::2], strict=True):
            optimizer.zero_grad()
            for x in pair:
                ((twin.model(x).square().mean() + twin.pull()) / 2).backward()
            optimizer.step()
            shares = twin.step()
    assert module.handle.controller.phase.step == 6
    assert_same_statistics(module.handle, twin, shares)
    assert_same_parameters(module.net, twin.model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["l2e"]
    assert int(saved["step"]) == 6
