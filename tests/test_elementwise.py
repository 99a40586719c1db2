"""Activations of users' own: modules whose forward is element-wise, and functions that are one where they stand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of

Function = Callable[[Tensor], Tensor]


class Own(nn.Module):
    """A user's activation, which may have a parameter."""

    def __init__(self, function: Callable[..., Tensor], parameter: Tensor | None = None) -> None:
        super().__init__()
        self.function, self.beta = function, nn.Parameter(parameter) if parameter is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.beta is None else self.function(x, self.beta)


def around(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 3))


BENT: dict[str, Function] = {
    "sine": lambda x: torch.sin(30 * x), "gaussian": lambda x: torch.exp(-(x**2) / 2),
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu by hand": lambda x: x.clamp(min=0), "relu in place": lambda x: x.clamp_(min=0),
    "relu by where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "leaky by where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)), "softsign": lambda x: x / (1 + x.abs()),
    "sigmoid by hand": lambda x: 1 / (1 + torch.exp(-x)), "snake": lambda x: x + torch.sin(x) ** 2,
    "threshold in place": lambda x: F.threshold_(x, 0.1, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", BENT)
def test_a_module_of_element_wise_steps_that_bend_is_an_activation(name: str) -> None:
    torch.manual_seed(0)
    model, x = around(Own(BENT[name])), torch.randn(5, 4)
    before = model(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    assert (site.name, site.kind) == ("1", "strict")
    assert torch.equal(model(x), before)
    with torch.no_grad():
        delta_of(model, site).fill_(0.5)
        z = model[0](x)
        expected = model[2](BENT[name](z.clone()) + 0.5 * z)
    torch.testing.assert_close(model(x), expected)
    bypass_fx.contract(model)


def test_a_number_among_its_parameters_is_no_hindrance() -> None:
    swish = Own(lambda x, beta: x * torch.sigmoid(beta * x), torch.ones(1))
    (site,) = bypass_fx.plan(around(swish), mode="strict")
    assert (site.name, site.activation) == ("1", "Own")


STRAIGHT: dict[str, nn.Module] = {
    "a scale": Own(lambda x: 2 * x + 1), "a comparison": Own(lambda x: x > 0),
    "a bent parameter": Own(lambda x, beta: x * torch.exp(beta), torch.ones(1)),
    "a parameter with axes": Own(lambda x, beta: torch.sin(beta * x), torch.ones(8)),
    "other axes": Own(lambda x: torch.exp(x).sum(-1, keepdim=True) * x),
}  # fmt: skip


@pytest.mark.parametrize("name", STRAIGHT)
def test_other_modules_are_no_activations(name: str) -> None:
    plan = bypass_fx.plan(nn.Sequential(nn.Linear(4, 8), STRAIGHT[name]), mode="all")
    assert not any(site.name == "1" for site in plan) and not any(refusal.name == "1" for refusal in plan.refusals)


@pytest.mark.parametrize("name", ["sine", "gelu by hand", "softsign"])
def test_channels_are_known_behind_a_users_activation(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Own(BENT[name]), nn.MaxPool2d(2), nn.ReLU())
    assert [(site.name, site.width) for site in bypass_fx.plan(model, mode="all")] == [("1", 6), ("3", 6)]


def test_a_module_that_returns_a_constant_is_no_activation() -> None:
    class Scale(nn.Module):
        def forward(self) -> float:
            return 2.0

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.scale, self.fc2 = nn.Linear(4, 8), Scale(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale() * self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]

    assert [site.name for site in bypass_fx.plan(Scaled(), mode="strict")] == ["relu"]
