"""Casts to another value's dtype, and dropouts that training mode alone runs, between W and σ, and σ and A."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=True) if self.training else x


class Block(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.first, self.last, self.drop, self.body = nn.Linear(4, 16), nn.Linear(16, 4), Drop(), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


Body = Callable[[Block, Tensor], Tensor]


def in_full_precision(s: Block, x: Tensor) -> Tensor:
    out: Tensor = s.last(F.gelu(s.first(x).float()).type_as(x))
    return out


def as_the_input(s: Block, x: Tensor) -> Tensor:
    out: Tensor = s.last(F.gelu(s.first(x).type_as(x)))
    return out


def by_a_child(s: Block, x: Tensor) -> Tensor:
    out: Tensor = s.last(s.drop(F.gelu(s.first(x))))
    return out


def in_a_branch(s: Block, x: Tensor) -> Tensor:
    h = s.first(x)
    if s.training:
        h = F.dropout(h, 0.3)
    out: Tensor = s.last(F.gelu(h))
    return out


def gives_its_dtype(s: Block, x: Tensor) -> Tensor:
    h = F.gelu(s.first(x))
    out: Tensor = s.last(h) + x.sum().type_as(h)
    return out


def scaled_too(s: Block, x: Tensor) -> Tensor:
    h = F.gelu(s.first(x))
    if s.training:
        h = F.dropout(h, 0.3) * 2
    out: Tensor = s.last(h)
    return out


def in_place(s: Block, x: Tensor) -> Tensor:
    h = F.gelu(s.first(x))
    F.dropout(h, 0.3, s.training, True)
    out: Tensor = s.last(h)
    return out


def in_place_in_training(s: Block, x: Tensor) -> Tensor:
    h = F.gelu(s.first(x))
    if s.training:
        F.dropout(h, 0.3, inplace=True)
    out: Tensor = s.last(h)
    return out


def planned(body: Body) -> tuple[Block, bypass_fx.Plan]:
    torch.manual_seed(0)
    block = Block(body).double() if body is not in_full_precision else Block(body)
    return block, bypass_fx.plan(block, mode="strict")


CASTS, DROPOUTS = [in_full_precision, as_the_input], [by_a_child, in_a_branch]


@pytest.mark.parametrize("body", CASTS)
def test_a_cast_to_the_dtype_of_another_value_is_a_wire(body: Body) -> None:
    _, plan = planned(body)
    assert [(site.kind, site.exact) for site in plan] == [("strict", "always")]


@pytest.mark.parametrize("body", DROPOUTS)
def test_a_dropout_that_training_mode_alone_runs_is_a_wire(body: Body) -> None:
    _, plan = planned(body)
    assert [(site.kind, site.exact) for site in plan] == [("strict", "eval")]


@pytest.mark.parametrize("body", [in_place, in_place_in_training])
def test_what_a_dropout_in_place_drops_is_noise_in_training_too(body: Body) -> None:
    block, plan = planned(body)
    assert [(site.kind, site.exact) for site in plan] == [("strict", "eval")]
    x = torch.randn(3, 4).double()
    bypass_fx.extend(block.eval(), plan)
    with torch.no_grad():
        block.first.weight.zero_()
        delta_of(block, plan.sites[0]).fill_(0.7)
    before = block(x)
    bypass_fx.contract(block)
    torch.testing.assert_close(block(x), before)


@pytest.mark.parametrize("body", [gives_its_dtype, scaled_too])
def test_a_value_that_gives_its_dtype_and_a_scale_in_one_mode_are_none(body: Body) -> None:
    assert not planned(body)[1].sites


@pytest.mark.parametrize("body", CASTS + DROPOUTS)
def test_the_fold_is_exact_behind_them(body: Body) -> None:
    block, plan = planned(body)
    x = torch.randn(3, 4).to(block.last.weight.dtype)
    for train in (True, False):
        torch.manual_seed(1)
        before = block.train(train)(x)
        bypass_fx.extend(block, plan)
        torch.manual_seed(1)
        assert torch.equal(block(x), before)
        bypass_fx.contract(block)
    bypass_fx.extend(block, plan)
    with torch.no_grad():
        block.first.weight[8:] = 0
        delta_of(block, bypass_fx.sites(block)[0])[8:] = torch.randn(8).to(x)
    before = block(x)
    bypass_fx.contract(block)
    torch.testing.assert_close(block(x), before)
