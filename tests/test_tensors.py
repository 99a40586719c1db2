"""A forward may ask whether a computed value is a tensor, where its graph is sure that it is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx


class Net(nn.Module):
    """W → σ → A."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.ones(4))
        self.pair = Pair()


class Pair(nn.Module):
    """A child that returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def act(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"a tensor is needed, not {type(x).__name__}")
    return F.relu(x)


def of_a_module(self: Any, x: Any) -> Any:
    return self.b(act(self.a(x)))


def of_arithmetic(self: Any, x: Any) -> Any:
    return self.b(act(self.a((2 * x.float() + 1).view(-1, 4) * self.scale.to(x.dtype))))


def of_a_parameter(self: Any, x: Any) -> Any:
    scale = self.scale.to(x.dtype) * 2
    return self.b(F.relu(self.a(x))) * (scale if isinstance(scale, Tensor) and not isinstance(scale, tuple) else 1)


def of_a_list(self: Any, x: Any) -> Any:
    x = torch.cat([x, x])
    return self.b(F.relu(self.a(torch.stack(x) if isinstance(x, tuple | list) else x)))


def of_an_attribute(self: Any, x: Any) -> Any:
    width = x.shape[-1]
    return self.b(F.relu(self.a(x))) * (2 if isinstance(width, int) else 1)


def of_a_child(self: Any, x: Any) -> Any:
    both = self.pair(x)
    return self.b(F.relu(self.a(both[0] if isinstance(both, tuple) else both)))


@pytest.mark.parametrize("body", [of_a_module, of_arithmetic, of_a_parameter, of_a_list])
def test_a_computed_tensor_says_that_it_is_one(body: Any) -> None:
    net, x = type("Own", (Net,), {"forward": body})(), torch.randn(3, 4)
    before = net(x)
    bypass_fx.extend(net, mode="strict")
    assert [site.constraint for site in bypass_fx.sites(net)] == ["folded"]
    assert torch.equal(net(x), before)


def of_places(self: Any, x: Any) -> Any:
    places = torch.where(x > 0)
    return self.b(F.relu(self.a(x))) * (2 if isinstance(places, tuple) else 1)


@pytest.mark.parametrize("body", [of_an_attribute, of_a_child, of_places])
def test_what_may_be_something_else_is_refused(body: Any) -> None:
    net = type("Own", (Net,), {"forward": body})()
    plan = bypass_fx.plan(net, mode="strict")
    assert not plan.sites and "the Python type of a computed value" in plan.refusals[0].reason


class Kind(Tensor):
    """A tensor of a kind of its own, which arithmetic keeps."""


def test_which_kind_of_tensor_a_computed_value_is_only_a_run_shows() -> None:
    def body(self: Any, x: Any) -> Any:
        return self.b(F.relu(self.a(x))) * (2 if isinstance(x + 1, (list, Kind)) else 1)

    net = type("Own", (Net,), {"forward": body})()
    plan = bypass_fx.plan(net, mode="strict")
    assert not plan.sites and "which kind of tensor" in plan.refusals[0].reason


def test_an_argument_on_which_the_answer_hangs_must_be_a_tensor() -> None:
    def body(self: Any, x: Any) -> Any:
        x = x * 2
        return self.b(F.relu(self.a(x if isinstance(x, Tensor) else torch.full((3, 4), x))))

    net, x = type("Own", (Net,), {"forward": body})(), torch.randn(3, 4)
    before, other = net(x), net(1.5)
    bypass_fx.extend(net, mode="strict")
    assert torch.equal(net(x), before) and torch.equal(net(1.5), other)
