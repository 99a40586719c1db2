"""Numbers in the texts of the errors that a forward raises; as Python compiles assertions: PYTEST_DONT_REWRITE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bypass_fx


class Net(nn.Module):
    """Checks its input first."""

    def __init__(self, check: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.check, self.first, self.last = check, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.last(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def raises(x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError("3 axes are needed, not %d" % (x.dim()))  # noqa: UP031 - what is tested


def raises_in_lines(x: Tensor) -> None:
    if len(x.shape) != 3:
        raise ValueError(
            "3 axes are needed, not %d, as in a batch of %3d"  # noqa: UP031
            % (len(x.shape), x.shape[0])
        )


def asserts(x: Tensor) -> None:
    assert x.dim() == 3, "3 axes are needed, not %d" % x.dim()  # noqa: UP031


@pytest.mark.parametrize(
    ("check", "kind"), [(raises, ValueError), (raises_in_lines, ValueError), (asserts, AssertionError)]
)
def test_an_error_may_say_a_number(check: Callable[[Tensor], Any], kind: type[Exception]) -> None:
    model, x = Net(check), torch.randn(2, 5, 8)
    before = model(x)
    bypass_fx.extend(model, mode="strict")
    assert torch.equal(model(x), before)
    with pytest.raises(kind, match=r"3 axes are needed, not <(dim|len)"):
        model(x[0])


def one_line(x: Tensor) -> None:
    if [1, 1, 1, 0][x.dim()]: raise ValueError("%d" % x.dim())  # fmt: skip # noqa: E701, UP031


def condition(x: Tensor) -> None:
    assert [1, 1, 1, 0][x.dim()] == 0, "%d" % x.dim()  # noqa: UP031


def goes_on(x: Tensor) -> None:
    try:
        raise ValueError("%d" % x.dim())  # noqa: UP031
    except ValueError as error:
        assert str(error) == "3"  # noqa: PT017 - the forward looks at it


@pytest.mark.parametrize("check", [one_line, condition, goes_on])
def test_a_number_that_the_forward_goes_by_is_refused(check: Callable[[Tensor], Any]) -> None:
    model = Net(check)
    assert isinstance(model(torch.randn(2, 5, 8)), Tensor)
    plan = bypass_fx.plan(model, mode="strict")
    assert not plan.sites and len(plan.refusals) == 1
