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
        self.net, self.restored = network(), None

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.handle = l2e.attach(self.net, "1", CONFIG, optimizer=optimizer)
        if self.restored:
            self.handle.load_state_dict(self.restored)
        return optimizer

    def training_step(self, batch, number):
        return self.net(batch).square().mean() + self.handle.loss()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["l2e"] = self.handle.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.restored = checkpoint["l2e"]


def trainer(folder, epochs):
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


@pytest.mark.filterwarnings("ignore")
def test_training_equals_the_reference(tmp_path):
    twin = Twin(network(), ["1"])
    module, training = Module(), trainer(tmp_path, 2)
    data = batches(6)
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    training.fit(module, loader)
    shares = twin.train(2 * [*zip(data[::2], data[1::2], strict=True)])
    assert module.handle.controller.phase.step == 6
    assert_same_statistics(module.handle, twin, shares)
    assert_same_parameters(module.net, twin.model)
    # Half of it, and the rest from its checkpoint by a new module, is the same to the bit.
    half = trainer(tmp_path, 1)
    half.fit(Module(), loader)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module()
    trainer(tmp_path, 2).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    state, other = module.handle.state_dict(), resumed.handle.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    for mine, theirs in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
