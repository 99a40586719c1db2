"""Sizes as arguments of torch's functions, which ask for numbers first and take traced values then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of


class Between(nn.Module):
    """Two convolutions, a ReLU, and something between the ReLU and the second."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(F.relu(self.first(x))))  # type: ignore[no-any-return]


BY_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "one size": lambda x: F.avg_pool2d(x, x.size(2)),
    "by keyword": lambda x: F.avg_pool2d(x, kernel_size=x.shape[2], stride=1),
    "two sizes": lambda x: F.avg_pool2d(x, (x.size(2), x.size(3))),
    "a piece of a size": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "a number made of one": lambda x: torch.roll(x, x.size(2) // 2, 2),
    "twice": lambda x: torch.roll(F.avg_pool2d(x, x.size(2)), x.size(2) // 2, 2),
    "groups": lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3), padding=x.size(2) // 4, groups=x.size(1)),
    "in another function": lambda x: F.channel_shuffle(x, x.size(1) // 4),
}


@pytest.mark.parametrize("name", BY_SIZES)
def test_a_size_may_be_an_argument_of_any_function_of_torch_s_and_is_that_of_each_call(name: str) -> None:
    model = Between(BY_SIZES[name])
    small, large = torch.randn(2, 3, 6, 6), torch.randn(1, 3, 8, 8)
    before = model(small), model(large)
    plan = bypass_fx.plan(model, mode="all")
    assert [site.activation for site in plan] == ["relu"], plan.refusals
    bypass_fx.extend(model, plan)
    assert torch.equal(model(small), before[0]) and torch.equal(model(large), before[1])


def test_a_mean_over_a_whole_map_leaves_the_fold_exact() -> None:
    model = Between(BY_SIZES["one size"]).double()
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight.zero_()
        delta_of(model, site).fill_(0.7)
    before = model(x)
    bypass_fx.contract(model)
    assert torch.allclose(model(x), before, rtol=1e-12)


def test_a_forward_that_catches_the_error_has_asked_all_the_same() -> None:
    def scaled(x: Tensor) -> Tensor:
        try:
            scale = [1, 2, 3, 4, 5, 6, 7][x.size(2)]
        except Exception:
            scale = 1
        return F.avg_pool2d(x, x.size(2)) * scale

    plan = bypass_fx.plan(Between(scaled), mode="all")
    assert not plan.sites and "goes on where that fails" in plan.refusals[0].reason
