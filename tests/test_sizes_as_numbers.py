"""Sizes that a forward hands to torch's functions, which ask whether they are numbers; and to Python, which needs numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx

Step = Callable[[Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.step = nn.Linear(4, 8), nn.Linear(8, 4), step

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(self.step(x))))  # type: ignore[no-any-return]


TAKEN: dict[str, Step] = {
    "reshape": lambda x: torch.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])),
    "reshape of a list": lambda x: torch.reshape(x, [x.size(0), -1, 4]),
    "broadcast_to": lambda x: torch.broadcast_to(x[:1], (x.shape[0], x.shape[1], 4)),
    "tile": lambda x: torch.tile(x, (x.shape[0], 1, 1)),
    "roll": lambda x: torch.roll(x, (x.shape[1] // 2,), (1,)),
    "narrow": lambda x: torch.narrow(x, 1, 0, x.shape[1] - 1),
    "topk": lambda x: torch.topk(x, x.shape[1] // 2, 1)[0],
}


@pytest.mark.parametrize("step", TAKEN.values(), ids=TAKEN.keys())
def test_functions_of_torch_take_sizes(step: Step) -> None:
    net, inputs = Net(step), [torch.randn(2, 6, 4), torch.randn(3, 5, 4)]
    before = [net(x) for x in inputs]
    assert [site.kind for site in bypass_fx.plan(net)] == ["strict"]
    bypass_fx.extend(net)
    assert all(torch.equal(net(x), out) for x, out in zip(inputs, before, strict=True))


def caught(x: Tensor) -> Tensor:
    try:
        count = len(range(x.shape[1]))
    except Exception:
        count = 1
    return x * count


REFUSED: dict[str, Step] = {
    "range": lambda x: x * len(range(x.shape[1])),
    "an item of a list": lambda x: x * [1.0, 2.0, 3.0][x.shape[0]],
    "a text": lambda x: x * len(f"{x.shape[0]:d}"),
    "a try that goes on": caught,
}


@pytest.mark.parametrize("step", REFUSED.values(), ids=REFUSED.keys())
def test_python_takes_numbers(step: Step) -> None:
    plan = bypass_fx.plan(Net(step), mode="all")
    assert not plan.sites
    assert "graph can't hold" in plan.refusals[0].reason


def raises_another(x: Tensor) -> Tensor:
    if (x > 0).any():
        try:
            x = x * operator.index(x.shape[1])
        except Exception as error:
            raise ValueError("no size") from error
    return x


def test_an_error_that_a_forward_raises_where_it_caught_one_of_the_trace_is_none_of_its_own() -> None:
    plan = bypass_fx.plan(Net(raises_another), mode="all")
    assert not plan.sites
    assert "ValueError: no size" in plan.refusals[0].reason


def of_three_axes(x: Tensor) -> Tensor:
    if len(x.shape) != 3:
        raise AssertionError("three axes")  # as an assert does, which pytest writes anew
    return x.view(*x.shape[:-1], 2, 2).flatten(-2)


def test_a_number_of_axes_that_a_forward_insists_on_is_asked_in_each_call() -> None:
    net, x = Net(of_three_axes), torch.randn(2, 3, 4)
    before = net(x)
    bypass_fx.extend(net, mode="all")
    assert torch.equal(net(x), before)
    with pytest.raises(AssertionError, match="three axes"):
        net(torch.randn(2, 3, 5, 4))
