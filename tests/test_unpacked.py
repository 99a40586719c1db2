"""Values that a forward unpacks into names, a star and other values beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bypass_fx


class Net(nn.Module):
    """Scales by what it says of its input."""

    def __init__(self, says: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.says, self.first, self.last = says, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))) * self.says(x)  # type: ignore[no-any-return]


def last_two(x: Tensor) -> Tensor:
    rows, columns, kind = *x.shape[-2:], x.dtype
    return torch.full((), rows * 10 + columns, dtype=kind)


def all_of_them(x: Tensor) -> Tensor:
    batch, rows, _, device = *x.size(), x.device
    return torch.arange(batch * rows, device=device).view(batch, rows, 1)


def in_the_end(x: Tensor) -> Tensor:
    kind, three, (one, two), batch, rows = x.dtype, max([1, 3]), [1, 2], *x.shape[:2]
    return torch.full((), three + one + two + batch * rows, dtype=kind)


def of_what_lists_make(x: Tensor) -> Tensor:
    batch, rows, pair = *torch.stack([x, x])[0].shape[:-1], [1, 2]
    return torch.full((), batch * rows * len(pair))


@pytest.mark.parametrize("says", [last_two, all_of_them, in_the_end, of_what_lists_make])
def test_a_size_is_unpacked_beside_other_values(says: Callable[[Tensor], Tensor]) -> None:
    model, inputs = Net(says), (torch.randn(2, 5, 8), torch.randn(3, 4, 8))
    before = [model(x) for x in inputs]
    plan = bypass_fx.plan(model, mode="strict")
    assert [site.name for site in plan] == ["relu"] and not plan.refusals
    bypass_fx.extend(model, plan)
    assert all(torch.equal(model(x), expected) for x, expected in zip(inputs, before, strict=True))


def two_stars(x: Tensor) -> Tensor:
    batch, rows, _, kind = *x.shape[:1], *x.shape[1:], x.dtype
    return torch.full((), batch * rows, dtype=kind)


def one_of_two(x: Tensor) -> Tensor:
    batch, rows, kind = *(x.shape[:2] if x.requires_grad else x.shape[1:]), x.dtype
    return torch.full((), batch * rows, dtype=kind)


@pytest.mark.parametrize("says", [two_stars, one_of_two])
def test_where_the_number_of_names_does_not_tell_the_sizes_it_stays_right(says: Callable[[Tensor], Tensor]) -> None:
    model, x = Net(says), torch.randn(2, 5, 8)
    before = model(x)
    plan = bypass_fx.plan(model, mode="strict")
    assert len(plan.sites) + len(plan.refusals) == 1
    if plan.sites:
        assert torch.equal(bypass_fx.extend(model, plan)(x), before)
