"""Constants that code can't write down as they print: NumPy's numbers and the members of an Enum."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bypass_fx


class Axis(enum.IntEnum):
    CHANNELS = 1


class Mode(str, enum.Enum):  # noqa: UP042 - what is tested
    SUM = "sum"


class Net(nn.Module):
    """W → σ → A, and what a forward does with the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.width = nn.Linear(4, 8), nn.Linear(8, 4), np.prod((2, 2))


def inner(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.relu(net.a(x)))  # type: ignore[no-any-return]


def divided(self: Any, x: Tensor) -> Tensor:
    return (x + inner(self, x)) / np.sqrt(2.0)


def in_front(self: Any, x: Tensor) -> Tensor:
    return np.log(2) - np.sqrt(2) * inner(self, x)


def viewed(self: Any, x: Tensor) -> Tensor:
    return inner(self, x).view(-1, self.width)[:, np.int64(2)]  # type: ignore[no-any-return]


def by_default(self: Any, x: Tensor, axis: Axis = Axis.CHANNELS, mode: Mode = Mode.SUM) -> Tensor:
    result = inner(self, x)
    return result.sum(axis) if mode == Mode.SUM else result.mean(axis)


@pytest.mark.parametrize("body", [divided, in_front, viewed, by_default])
def test_a_constant_of_a_kind_of_its_own_is_written_down(body: Any) -> None:
    net, x = type("Own", (Net,), {"forward": body})(), torch.randn(3, 4)
    before = net(x)
    bypass_fx.extend(net, mode="strict")
    assert [site.constraint for site in bypass_fx.sites(net)] == ["folded"]
    assert torch.equal(net(x), before)
    if body is by_default:
        assert torch.equal(net(x, Axis.CHANNELS, mode=Mode.SUM), before)
    bypass_fx.contract(net)
    assert torch.equal(net(x), before)
