"""Activations of users' own: modules whose forward is element-wise, and functions that are one where they stand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.plan import Mode
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


class Inline(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.fc1, self.norm, self.fc2 = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.function(self.fc1(x)))  # type: ignore[no-any-return]


class Normed(Inline):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.function(self.norm(self.fc1(x))))  # type: ignore[no-any-return]


PLACED: dict[str, Function] = {
    "sin": torch.sin, "cos": lambda x: x.cos(), "sin in place": torch.sin_,
    "clamp": lambda x: x.clamp(min=0), "clamp_": lambda x: torch.clamp_(x, 0.0), "clamp_min": lambda x: x.clamp_min(0),
}  # fmt: skip


@pytest.mark.parametrize("owner", [Inline, Normed])
@pytest.mark.parametrize("name", PLACED)
def test_a_sine_or_a_clamp_at_0_of_what_an_affine_map_makes_is_an_activation(name: str, owner: type[Inline]) -> None:
    torch.manual_seed(0)
    model, x = owner(PLACED[name]).eval(), torch.randn(5, 4)
    before = model(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    assert site.activation == name.split()[0].removesuffix("_")
    assert torch.equal(model(x), before)
    with torch.no_grad():
        delta_of(model, site).fill_(0.5)
        z = model.fc1(x) if owner is Inline else model.norm(model.fc1(x))
        expected = model.fc2(PLACED[name](z.clone()) + 0.5 * z)
    torch.testing.assert_close(model(x), expected)


BETWEEN: dict[str, Function] = {
    "sine": lambda x: torch.sin(30.0 * x), "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x), "square": lambda x: x**2,
    "swish": lambda x: x * torch.sigmoid(1.702 * x), "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "gelu by tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))), "relu squared": lambda x: F.relu(x) ** 2,
    "snake": lambda x: x + torch.sin(x).pow(2) / 1.5, "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
}  # fmt: skip


@pytest.mark.parametrize("owner", [Inline, Normed])
@pytest.mark.parametrize("name", BETWEEN)
def test_element_wise_steps_between_two_affine_maps_are_an_activation(name: str, owner: type[Inline]) -> None:
    torch.manual_seed(0)
    model, x = owner(BETWEEN[name]).double().eval(), torch.randn(5, 4).double()
    before = model(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model.fc1.weight.zero_()  # any D meets the constraint
        delta_of(model, site).fill_(0.5)
        z = model.fc1(x) if owner is Inline else model.norm(model.fc1(x))
        torch.testing.assert_close(model(x), model.fc2(BETWEEN[name](z) + 0.5 * z))
    before = model(x)
    bypass_fx.contract(model)
    torch.testing.assert_close(model(x), before)


class Guarded(Inline):
    """What the steps end in is read elsewhere too, or a step inside is, or another value enters them."""

    def __init__(self, how: str) -> None:
        super().__init__(torch.exp)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        if self.how == "the end":
            scale = torch.exp(z)
            return self.fc2(scale) + scale.sum()  # type: ignore[no-any-return]
        if self.how == "inside":
            inner = z**2
            return self.fc2(torch.exp(-inner)) + inner.sum()  # type: ignore[no-any-return]
        if self.how == "another":
            return self.fc2(torch.exp(z) * x.sum())  # type: ignore[no-any-return]
        return self.fc2((z**2).mul_(2.0))  # type: ignore[no-any-return]


def test_an_activation_inside_of_other_steps_is_none_where_these_are_one_and_else_a_site() -> None:
    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    assert [site.activation for site in bypass_fx.plan(Inline(swish), mode="all")] == ["sigmoid"]
    assert [site.kind for site in bypass_fx.plan(Inline(swish), mode="all")] == ["strict"]
    gate = Inline(lambda x: torch.cat([swish(x)[:, :4], x[:, 4:]], 1))
    assert [(site.name, site.kind) for site in bypass_fx.plan(gate, mode="all")] == [("sigmoid", "relaxed")]


@pytest.mark.parametrize("how", ["the end", "inside", "another", "in place"])
@pytest.mark.parametrize("mode", ["strict", "all"])
def test_other_steps_are_none(how: str, mode: Mode) -> None:
    plan = bypass_fx.plan(Guarded(how), mode=mode, example_inputs=(torch.randn(2, 4),))
    assert not plan.sites and not plan.refusals


def test_a_sine_that_is_no_strict_site_is_a_relaxed_one() -> None:
    model = Inline(lambda x: torch.cat([torch.sin(30.0 * x)[:, :4], x[:, 4:]], 1))
    assert [(site.name, site.kind) for site in bypass_fx.plan(model, mode="all")] == [("sin", "relaxed")]


class Elsewhere(nn.Module):
    """A position's sine, an index, a box and a guard against zero: none is an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc1, self.fc2 = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.fc1(self.table(ids.clamp(min=0)) + torch.sin(torch.arange(4.0)))
        box = (h[..., 2:] - h[..., :2]).clamp(min=0)
        return self.fc2(h) / h.norm(dim=-1, keepdim=True).clamp(min=1e-6) + box.sum()  # type: ignore[no-any-return]


def test_elsewhere_they_are_none() -> None:
    plan = bypass_fx.plan(Elsewhere(), mode="all", example_inputs=(torch.zeros(2, 3, dtype=torch.long),))
    assert not plan.sites and not plan.refusals


@pytest.mark.parametrize("name", ["sine", "gelu by hand", "softsign"])
def test_channels_are_known_behind_a_users_activation(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Own(BENT[name]), nn.MaxPool2d(2), nn.ReLU())
    assert [(site.name, site.width) for site in bypass_fx.plan(model, mode="all")] == [("1", 6), ("3", 6)]


def test_steps_in_training_alone_leave_the_activations_of_both_modes_alone() -> None:
    class Sampled(Inline):
        def forward(self, x: Tensor) -> Tensor:
            z = self.fc1(x)
            if self.training:
                z = z + torch.exp(0.5 * self.fc1(x)) * torch.randn_like(z)
            return self.fc2(torch.tanh(z))  # type: ignore[no-any-return]

    assert [site.name for site in bypass_fx.plan(Sampled(torch.exp), mode="all")] == ["tanh"]


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


WHOLE: dict[str, Function] = {
    "where": lambda x: torch.where(x > 0, 1, 0), "counted": lambda x: (torch.exp(x) > 1) + (x > 0) * 2,
    "compared": lambda x: torch.maximum(x > 1, x < 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_steps_that_make_whole_numbers_are_no_activation(name: str) -> None:
    """D z has no place among them."""

    class Cast(Inline):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.function(self.fc1(x)).to(x.dtype))  # type: ignore[no-any-return]

    class Between(Inline):
        def __init__(self, function: Function) -> None:
            super().__init__(function)
            self.own = Own(function)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.own(self.fc1(x)).to(x.dtype))  # type: ignore[no-any-return]

    for model in (Cast(WHOLE[name]), Between(WHOLE[name])):
        assert len(bypass_fx.plan(model, mode="all")) == 0
