"""Images: channels are the neurons, in either memory format, before views and in-place ReLUs."""

import pytest
import torch
from torch import nn

import l2e
from tests.l2e.loops.twin import CONFIG, Twin, train_both


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.head = nn.Linear(6 * 9, 2)

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.conv(x))))
        return self.head(x.contiguous().view(-1, 6 * 9))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["conv", "norm", "pool"])
def test_channels_are_neurons(name, memory_format):
    model = Images().to(memory_format=memory_format).train()
    output = (lambda out: out.clone()) if name == "norm" else (lambda out: out)
    twin = Twin(model, [name], neuron_dim=1, output=output)
    handle = l2e.attach(model, name, CONFIG, neuron_dim=1)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(6)]
    data = [x.to(memory_format=memory_format) for x in data]
    assert train_both(model, twin, handle, data)
