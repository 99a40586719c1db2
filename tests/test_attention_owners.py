"""Attention in several owners of one class: what is found in one holds for another only where all that matters is equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from tests.attentions import HEADS, Attention


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 8, dtype=torch.float64)


class Between(nn.Module):
    """Attention from one sequence to another; the result is returned beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        mixed = F.scaled_dot_product_attention(self.q(x), memory, self.v(memory))
        return self.proj(mixed), mixed


def test_equal_owners_that_are_called_in_other_ways_are_judged_apart(x: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alone, self.cross, self.read = Between(), Between(), Between()

        def forward(self, x: Tensor) -> Tensor:
            x = self.alone(x, x)[0]
            x = self.cross(x[:, :2], x)[0]
            out, mixed = self.read(x, x)
            return out + mixed  # type: ignore[no-any-return]

    net = Net().double()
    before = net(x)
    plan = bypass_fx.plan(net)
    assert [site.owner for site in plan] == ["alone"]
    assert torch.equal(bypass_fx.extend(net, plan)(x), before)


class Weights(nn.Module):
    """Applies the weights of children that it does not call."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, inner), nn.Linear(8, inner), nn.Linear(8, inner)
        self.o = nn.Linear(inner, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        made = (F.linear(x, each.weight, each.bias) for each in (self.q, self.k, self.v))
        q, k, v = (each.view(batch, tokens, HEADS, -1).transpose(1, 2) for each in made)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        return F.linear(mixed, self.o.weight, self.o.bias)


@pytest.mark.parametrize("widths", [(8, 16), (16, 8)])
def test_owners_of_one_graph_and_other_widths_have_paths_of_their_own(widths: tuple[int, int], x: Tensor) -> None:
    net = nn.Sequential(*map(Weights, widths)).double()
    before = net(x)
    assert [site.width for site in bypass_fx.plan(net)] == list(widths)
    assert torch.equal(bypass_fx.extend(net)(x), before)


class Wrap(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Twice(Attention):
    """Uses the result a second time, in a child: with A itself, or with a map of its own."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.wrap = Wrap(self.proj if tied else nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.wrap(mixed).sin() + self.proj(mixed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [(True, False), (False, True)])
def test_owners_whose_children_use_the_result_otherwise_are_judged_apart(tied: tuple[bool, bool]) -> None:
    net = nn.Sequential(*map(Twice, tied))
    assert [site.owner for site in bypass_fx.plan(net, mode="strict")] == [str(tied.index(True))]
