"""What overwrites a value in place, in whichever forward: no strict site goes by what the value was before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of


class Swish(nn.Module):
    """Its own forward writes into its input, and no flag says so."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.linear(x)  # type: ignore[no-any-return]


class Passes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Late(nn.Module):
    """Hands its argument on, to be overwritten by another."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.act, self.linear = Passes(), nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.act(self.same(x)))  # type: ignore[no-any-return]


class TwoBranches(nn.Module):
    """Both branches read one value; what the first leaves of it is what the second reads."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(4, 8), first, nn.Sequential(nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.first(h) + self.second(h)  # type: ignore[no-any-return]


def branch(activation: nn.Module) -> nn.Module:
    return nn.Sequential(activation, nn.Linear(8, 3))


BRANCHES = {
    "a flag": branch(nn.LeakyReLU(0.3, inplace=True)), "a flag, deeper": nn.Sequential(branch(nn.ReLU(inplace=True))),
    "a forward of its own": branch(Swish()), "a step before": Shifted(), "handed on": Late(),
    "through an Identity": nn.Sequential(nn.Identity(), branch(nn.ReLU(inplace=True))),
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_a_value_that_another_forward_overwrites_has_no_strict_site(name: str) -> None:
    model = TwoBranches(copy.deepcopy(BRANCHES[name]))
    plan = bypass_fx.plan(model, mode="strict")
    reasons = {refusal.name: refusal.reason for refusal in plan.refusals}
    assert "overwritten in place" in reasons["second.0"]
    assert not any(site.name == "second.0" for site in plan)
    assert any(site.name == "second.0" for site in bypass_fx.plan(model, mode="all"))


def test_branches_that_overwrite_nothing_are_both_strict() -> None:
    assert len(bypass_fx.plan(TwoBranches(branch(nn.ReLU())), mode="strict")) == 2


def test_an_activation_that_overwrites_its_input_in_its_own_forward_gets_a_copy_of_z() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Swish(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    before = model(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    delta = delta_of(model, site)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        delta.copy_(torch.randn(8))
        z = model[0](x)
        expected = model[2](z * z.sigmoid() + delta * z)
    torch.testing.assert_close(model(x), expected)


def test_owners_of_one_graph_differ_where_one_has_a_child_that_overwrites_z() -> None:
    """Their code is not shared: the one whose z is overwritten keeps a copy of it."""

    class Owner(nn.Module):
        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.stem, self.other, self.head = nn.Linear(4, 4), other, nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            y = torch.tanh(h)
            return self.head(y) + self.other(h)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = nn.Sequential(Owner(nn.SiLU()), Owner(nn.SiLU(inplace=True)))
    plain, x = copy.deepcopy(model), torch.randn(5, 4)
    bypass_fx.extend(model, mode="relaxed", select="*.tanh")
    assert len(bypass_fx.sites(model)) == 2
    for net in (plain, model):
        net(x).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


class Branching(nn.Module):
    """No graph shows what it does: which way it goes, it decides by what a value holds."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.act, self.linear = act, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return self.linear(-x)  # type: ignore[no-any-return]
        return self.linear(self.act(x) if self.act is not None else self.changed(x))  # type: ignore[no-any-return]

    def changed(self, x: Tensor) -> Tensor:
        return 2 * x


class Writing(Branching):
    def changed(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Adding(Branching):
    def changed(self, x: Tensor) -> Tensor:
        x += 2
        return x


class Filling(Branching):
    def changed(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return x


@pytest.mark.parametrize("first", [Writing(), Adding(), Filling(), Branching(nn.SiLU(inplace=True))])
def test_a_value_that_a_forward_without_a_graph_may_overwrite_has_no_strict_site(first: nn.Module) -> None:
    model = TwoBranches(copy.deepcopy(first))
    reasons = {refusal.name: refusal.reason for refusal in bypass_fx.plan(model, mode="strict").refusals}
    assert "overwritten in place" in reasons["second.0"]


def test_a_forward_without_a_graph_that_writes_nothing_is_no_hindrance() -> None:
    for first in (Branching(), Branching(nn.SiLU())):
        assert [site.name for site in bypass_fx.plan(TwoBranches(first), mode="strict")] == ["second.0"]


@pytest.mark.parametrize("last", [branch(nn.ReLU(inplace=True)), Shifted(), Adding()])
def test_a_relaxed_site_keeps_its_z_from_a_forward_that_overwrites_it_later(last: nn.Module) -> None:
    """Tanh's backward asks for its result alone, and that of ψ for z."""

    class Both(TwoBranches):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.second(h.view(-1, 8)) + self.first(h)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Both(copy.deepcopy(last)), torch.randn(5, 4)
    plain = copy.deepcopy(model)
    bypass_fx.extend(model, mode="relaxed", select="second.0")
    for net in (plain, model):
        net(x).sum().backward()
    torch.testing.assert_close(model.stem.weight.grad, plain.stem.weight.grad)


VIEWS: dict[str, Callable[[Tensor], object]] = {
    "diagonal": lambda z: torch.diagonal(z).mul_(2), "narrow": lambda z: torch.narrow(z, 1, 0, 2).zero_(),
    "movedim": lambda z: torch.movedim(z, 0, 1).add_(1), "ravel": lambda z: z.ravel().mul_(2),
    "a list": lambda z: torch._foreach_mul_([z], 2.0), "atleast_2d": lambda z: torch.atleast_2d(z).neg_(),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_a_value_that_is_overwritten_through_a_view_or_in_a_list_has_no_strict_site(name: str) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc1(x)
            VIEWS[name](z)
            return self.fc2(torch.tanh(z))  # type: ignore[no-any-return]

    (refusal,) = bypass_fx.plan(Inside(), mode="strict").refusals
    assert "overwritten in place" in refusal.reason
