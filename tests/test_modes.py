"""Forwards that do one thing in training mode and another in eval mode."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu(self.fc1(x)))
        return out


class ReadInEval(nn.Module):
    """In eval mode it gives A something else to read, too."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.mlp, self.by_name = Mlp(), by_name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        if not self.training:
            y = y + (self.mlp.fc2.bias if self.by_name else self.mlp.fc2(x.repeat(1, 2)))
        return y


def test_a_bias_that_eval_mode_alone_reads_elsewhere_too_is_not_folded_into() -> None:
    for by_name in (False, True):
        (site,) = bypass_fx.plan(ReadInEval(by_name), mode="strict").sites
        assert site.constraint == "augmented"
