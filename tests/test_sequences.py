"""Sequences of different lengths: torch packs and pads them with functions that look into what they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bypass_fx


class Encoder(nn.Module):
    """An activation in front of a recurrent layer, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(6, 5), nn.Linear(5, 2)
        self.rnn = nn.GRU(4, 3, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.d(torch.tanh(self.c(states)))  # type: ignore[no-any-return]


class ByName(Encoder):
    """The same by the functions' full names, and the last states alone."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.d(torch.tanh(self.c(states)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Encoder, ByName])
def test_sites_in_front_of_packed_sequences_and_behind_them(kind: type[Encoder]) -> None:
    net = kind().eval()
    inputs = [
        (torch.randn(3, 6, 4), torch.tensor([6, 2, 4])),
        (torch.randn(2, 5, 4), torch.tensor([3, 5])),
    ]
    before = [net(*each) for each in inputs]
    bypass_fx.extend(net, mode="strict")
    assert [(site.name, site.constraint) for site in bypass_fx.sites(net)] == [("relu", "folded"), ("tanh", "folded")]
    assert all(map(torch.equal, (net(*each) for each in inputs), before))
    net(*inputs[0]).sum().backward()
    bypass_fx.contract(net)
    assert all(map(torch.equal, (net(*each) for each in inputs), before))
