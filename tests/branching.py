"""Forwards that branch, as modules of two layers, and inputs that take the one branch and the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Body = Callable[[Any, Tensor], Any]


class Two(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)
        self.body = [body]  # a list, so that the instance holds no method

    def forward(self, x: Tensor) -> Any:
        return self.body[0](self, x)


def net(body: Body) -> nn.Module:
    """A module whose forward is the body."""

    class Own(Two):
        def forward(self, x: Tensor) -> Any:
            return body(self, x)

    return Own(body)


INPUTS = [
    torch.randn(1, 4),
    torch.randn(2, 4),
    torch.randn(3, 4),
    torch.randn(4),
    torch.randn(3, 2, 4),
    -torch.ones(2, 4),
]


def equal(one: Any, other: Any) -> bool:
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    return True
