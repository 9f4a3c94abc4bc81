"""Modules called at every position, and recurrent layers with packed sequences."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import l2e
from tests.l2e.loops.twin import CONFIG, Twin, train_both


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.LSTMCell(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        state = None
        for position in x.unbind(1):
            state = self.cell(position, state)
        return self.head(state[0])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        lengths = [x.shape[1] - n for n in range(len(x))]
        out, _ = self.gru(pack_padded_sequence(x, lengths, batch_first=True))
        return self.head(out.data)


def sequences(steps=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, 4, generator=generator) for _ in range(steps)]


def test_every_position_is_a_sample():
    model = Cells().train()
    twin = Twin(model, ["cell"], output=lambda out: out[0])
    handle = l2e.attach(model, "cell", CONFIG)
    assert train_both(model, twin, handle, sequences())
    assert float(handle.state_dict()["cell.samples"]) == 8 * 5 * 7


def test_packed_sequences_have_no_padding():
    model = Packed().train()
    twin = Twin(model, ["gru"], output=lambda out: out[0].data)
    handle = l2e.attach(model, "gru", CONFIG)
    assert train_both(model, twin, handle, sequences())
    assert float(handle.state_dict()["gru.samples"]) == 8 * (7 + 6 + 5 + 4 + 3)
