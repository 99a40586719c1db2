"""Activations that a module holds as callables: sites of their own where its forward has no graph."""

from __future__ import annotations

import copy
import functools
import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.plan import Mode
from bypass_fx.surgery import delta_of

Held = Callable[..., Tensor]


class Untraceable(nn.Module):
    """Its forward asks for a value, so it has no graph; the activation is an attribute."""

    def __init__(self, activation: Held | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        if activation is not None:
            self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if float(h.detach().abs().sum()) > 1e9:
            return x
        return x + self.b(self.activation(h))


class OfTheClass(Untraceable):
    activation = staticmethod(F.softplus)


class Builtin(Untraceable):
    activation = torch.tanh


HELD: dict[str, Held | None] = {
    "function": F.relu,
    "builtin": torch.sigmoid,
    "builtin with options": F.gelu,
    "in place": torch.relu_,
    "partial": functools.partial(F.leaky_relu, negative_slope=0.2),
    "partial of a builtin": functools.partial(F.gelu, approximate="tanh"),
    "partial in place": functools.partial(F.elu, inplace=True),
    "lambda": lambda z: F.silu(z) * 2,
}
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def models() -> dict[str, nn.Module]:
    return {name: Untraceable(held) for name, held in HELD.items()} | {
        "class": OfTheClass(),
        "class builtin": Builtin(),
    }


@pytest.mark.parametrize("name", models())
def test_a_callable_attribute_is_a_site_and_stays_as_it_was(name: str) -> None:
    model = models()[name]
    before, attributes, keys = model(X), dict(model.__dict__), list(model.state_dict())
    bypass_fx.extend(model, example_inputs=(X,))
    site = bypass_fx.sites(model)[0]
    assert (site.kind, site.constraint, site.method, site.width) == ("relaxed", "zero", "activation", 8)
    assert torch.equal(model(X), before)
    assert {key: value for key, value in model.__dict__.items() if key != "_bypass_plan"} == attributes
    model(X).sum().backward()
    assert delta_of(model, site).grad is not None
    with torch.no_grad():
        delta_of(model, site).fill_(0.5)
    h, gain = model.a(X), 2 if name == "lambda" else 1
    assert torch.allclose(model(X), X + model.b(activation_of(model, h.clone()) + 0.5 * gain * h))
    bypass_fx.contract(model)
    assert model.__dict__ == attributes and list(model.state_dict()) == keys and torch.equal(model(X), before)


def activation_of(model: nn.Module, z: Tensor) -> Tensor:
    """What the model's own callable makes of a value."""
    held = model.__dict__.get("activation") or type(model).__mro__[1].activation
    return held(z)  # type: ignore[no-any-return]


def test_it_is_called_with_options_that_the_plan_did_not_see() -> None:
    class Options(Untraceable):
        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return x if float(z.detach().sum()) > 1e9 else x + self.b(self.activation(z, approximate="tanh"))

    model = Options(F.gelu)
    before = model(X)
    bypass_fx.extend(model, mode="all", example_inputs=(X,))
    assert torch.equal(model(X), before)


def test_the_attribute_can_not_be_changed_under_the_surgery() -> None:
    model = bypass_fx.extend(Untraceable(F.relu), mode="all", example_inputs=(X,))
    with pytest.raises(bypass_fx.SurgeryError, match="contract the model, set it"):
        model.activation = F.gelu
    bypass_fx.contract(model)
    model.activation = F.gelu


def test_copies_state_dicts_and_compiled_code_follow() -> None:
    model = Untraceable(F.relu)
    before = model(X)
    bypass_fx.extend(model, mode="all", example_inputs=(X,))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        delta_of(twin, bypass_fx.sites(twin)[0]).fill_(1.0)
    assert torch.equal(model(X), before) and not torch.equal(twin(X), before)
    saved = io.BytesIO()
    torch.save(twin.state_dict(), saved)
    saved.seek(0)
    model.load_state_dict(torch.load(saved))
    assert torch.equal(model(X), twin(X))
    compiled = torch.compile(model.activation, backend="aot_eager")
    h = model.a(X).detach()
    assert torch.allclose(compiled(h), torch.relu(h) + h)
    bypass_fx.contract(model)
    assert torch.equal(model(X), before)


def test_equal_owners_share_a_class_and_a_plan_goes_to_a_fresh_model() -> None:
    model = nn.Sequential(Untraceable(F.relu), Untraceable(F.relu), Untraceable(F.gelu))
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    fresh = bypass_fx.extend(copy.deepcopy(model), bypass_fx.Plan.from_json(plan.to_json()))
    assert type(fresh[0]) is type(fresh[1]) is not type(fresh[2])
    assert torch.equal(fresh(X), model(X)) and len(bypass_fx.sites(fresh)) == 3


def test_one_that_is_no_activation_or_has_no_graph_is_left_alone() -> None:
    def wary(z: Tensor) -> Tensor:
        return F.relu(z) if float(z.sum()) < 1e9 else z

    assert not bypass_fx.plan(Untraceable(torch.neg), mode="all", example_inputs=(X,)).refusals
    plan = bypass_fx.plan(Untraceable(wary), mode="all", example_inputs=(X,))
    assert not plan.sites and [refusal.activation for refusal in plan.refusals] == ["relu"]


@pytest.mark.parametrize("how", ["closure", "method", "partial"])
def test_a_forward_assigned_on_the_instance_is_rewritten_before_it(how: str) -> None:
    model = Untraceable()

    def forward(self: Any, x: Tensor, k: float = 1.0) -> Tensor:
        return self.b(F.relu(self.a(x))) * k  # type: ignore[no-any-return]

    ways: dict[str, Held] = {
        "closure": lambda x: forward(model, x),
        "method": types.MethodType(forward, model),
        "partial": functools.partial(forward, model, k=2.0),
    }
    model.forward = own = ways[how]  # type: ignore[method-assign, assignment]
    before = model(X)
    bypass_fx.extend(model)
    with torch.no_grad():
        delta_of(model, bypass_fx.sites(model)[0]).fill_(0.5)
    assert not torch.equal(model(X), before)
    bypass_fx.contract(model)
    assert model.__dict__["forward"] is own and type(model) is Untraceable


@pytest.mark.parametrize("where", ["module", "global"])
def test_callables_in_containers_are_refused_by_name(where: str) -> None:
    held = {"relu": torch.relu}

    class Chooses(Untraceable):
        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            act = (self.choices if where == "module" else CHOICES)["relu"]
            return x if float(z.sum()) > 1e9 else self.b(act(z))  # type: ignore[no-any-return, operator]

    model = Chooses()
    model.choices = held  # type: ignore[assignment]
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    assert not plan.sites and "relu" in [refusal.activation for refusal in plan.refusals]


CHOICES = {"relu": torch.relu}


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * torch.sigmoid(z)


def test_an_autograd_function_is_refused_by_the_activation_in_it() -> None:
    class Applies(Untraceable):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(Swish.apply(self.a(x)))  # type: ignore[no-any-return, no-untyped-call]

    plan = bypass_fx.plan(Applies(), mode="all")
    assert [refusal.activation for refusal in plan.refusals] == ["sigmoid"]
    assert "autograd function Swish" in plan.refusals[0].reason


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.tanh() if z.numel() else Again.apply(z)  # type: ignore[no-any-return, no-untyped-call]


def test_an_autograd_function_may_name_itself() -> None:
    class Applies(Untraceable):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(Again.apply(self.a(x)))  # type: ignore[no-any-return, no-untyped-call]

    plan = bypass_fx.plan(Applies(), mode="all")
    assert [refusal.activation for refusal in plan.refusals] == ["tanh"]


class Looping(nn.Module):
    """Applies its activation once for each row: its forward has no graph."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.activation, self.b = nn.Linear(4, 4), activation, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for _ in range(x.shape[0]):
            h = self.activation(h)
        return self.b(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["strict", "all"])
def test_an_activation_that_an_untraced_forward_shares_is_refused_there(mode: Mode) -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            activation = nn.SiLU()
            self.plain = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4))
            self.looping = Looping(activation)

        def forward(self, x: Tensor) -> Tensor:
            return self.looping(self.plain(x))  # type: ignore[no-any-return]

    plan = bypass_fx.plan(Sharing(), mode=mode)
    assert [site.name for site in plan] == ["plain.1"]
    assert [(refusal.name, refusal.activation) for refusal in plan.refusals] == [("looping.activation", "silu")]
    assert "the number that a size is" in plan.refusals[0].reason
