"""Activations in callables and plain objects that a module holds: sites where the call traces, refusals where it does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    """Calls what it holds in one of several ways."""

    def __init__(self, held: Any, call: Callable[[Any, Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.held, self.call = held, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, self.held, x)


class Branching:
    """As an attention processor: it gets the module, and asks for a value."""

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        return module.b(torch.relu(module.a(x))) if x.sum() > -math.inf else x  # type: ignore[no-any-return]

    def run(self, module: Any, x: Tensor) -> Tensor:
        return module.b(F.silu(module.a(x))) if x.sum() > -math.inf else x  # type: ignore[no-any-return]


class Nested:
    def __init__(self) -> None:
        self.inner = {"one": [Branching()]}

    def go(self, module: Any, x: Tensor) -> Tensor:
        return self.inner["one"][0].run(module, x)


class Slotted:
    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = Branching()

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        return self.inner(module, x)


class WithFunctions:
    """Has its activations as a builtin of its own and as a module that is nobody's child."""

    shape = staticmethod(torch.sigmoid)

    def __init__(self) -> None:
        self.last = nn.Mish()

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        z = module.b(self.shape(module.a(x)))
        return self.last(z) if z.sum() > -math.inf else z  # type: ignore[no-any-return]


class Inherits(Branching):
    pass


CALLED: dict[str, tuple[Any, Callable[[Any, Any, Tensor], Tensor], set[str], str]] = {
    "object": (Branching(), lambda m, held, x: held(m, x), {"relu"}, "Branching.__call__"),
    "inherited": (Inherits(), lambda m, held, x: held(m, x), {"relu"}, "Branching.__call__"),
    "method of an object": (Branching(), lambda m, held, x: held.run(m, x), {"silu"}, "Branching.run"),
    "bound method": (Branching().run, lambda m, held, x: held(m, x), {"silu"}, "Branching.run"),
    "in a list": ([Branching()], lambda m, held, x: held[0](m, x), {"relu"}, "Branching.__call__"),
    "in a dict": ({"p": Branching()}, lambda m, held, x: held["p"](m, x), {"relu"}, "Branching.__call__"),
    "partial": (functools.partial(Branching()), lambda m, held, x: held(m, x), {"relu"}, "Branching.__call__"),
    "partial of a method": (
        functools.partial(Branching().run), lambda m, held, x: held(m, x), {"silu"}, "Branching.run"
    ),
    "object in an object": (Nested(), lambda m, held, x: held.go(m, x), {"silu"}, "Branching.run"),
    "in a slot": (Slotted(), lambda m, held, x: held(m, x), {"relu"}, "Branching.__call__"),
    "what an object holds": (WithFunctions(), lambda m, held, x: held(m, x), {"sigmoid", "mish"}, "`held` holds"),
}  # fmt: skip


@pytest.mark.parametrize("how", CALLED)
def test_an_activation_in_a_held_callable_that_does_not_trace_is_refused_by_its_name(how: str) -> None:
    held, call, activations, where = CALLED[how]
    model = Holder(held, call)
    model(X)  # it is a model that runs
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    refused = {refusal.activation: refusal.reason for refusal in plan.refusals}
    assert not plan.sites and refused.keys() >= activations
    assert all(where in refused[activation] for activation in activations)


def test_one_that_is_not_called_by_any_name_is_not_listed() -> None:
    model = Holder(Branching(), lambda m, held, x: m.b(m.a(x)) if x.sum() > 0 else x)
    model.spare = model.__dict__.pop("held")
    model.forward = lambda x: model.call(model, None, x)  # type: ignore[method-assign]
    assert not bypass_fx.plan(model, mode="all", example_inputs=(X,)).refusals


class Straight:
    def __call__(self, module: Any, x: Tensor) -> Tensor:
        return module.b(torch.relu(module.a(x)))  # type: ignore[no-any-return]


def test_one_that_traces_has_its_sites() -> None:
    model = Holder(Straight(), lambda m, held, x: held(m, x))
    before = model(X)
    bypass_fx.extend(model)
    assert [site.constraint for site in bypass_fx.sites(model)] == ["folded"]
    assert torch.equal(model(X), before)
    bypass_fx.contract(model)
    assert torch.equal(model(X), before)


class Asking:
    """A traced value answers the question wrongly, and unseen."""

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        z = self.kept(module.a(x))
        return module.b(torch.relu(z)) if self.same(x, z) else module.b(torch.tanh(z))  # type: ignore[no-any-return]

    def same(self, x: Tensor, z: Tensor) -> bool:
        return x is z

    def kept(self, z: Tensor) -> Tensor:
        return z


def test_traps_of_tracing_are_seen_in_held_objects_too() -> None:
    model = Holder(Asking(), lambda m, held, x: held(m, x))
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    assert not plan.sites and {refusal.activation for refusal in plan.refusals} == {"relu", "tanh"}
    assert all("`same` asks whether two values are the same object" in refusal.reason for refusal in plan.refusals)


class Remembering:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        self.last = torch.relu(module.a(x))
        self.seen.append(self.last)
        return module.b(self.last)  # type: ignore[no-any-return]


def test_a_held_callable_that_keeps_values_is_left_as_it_was() -> None:
    model = Holder(held := Remembering(), lambda m, held, x: held(m, x))
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    assert not plan.sites and "outlives the call" in plan.refusals[0].reason
    assert held.last is None and held.seen == []


def test_equal_owners_with_different_objects_are_told_apart() -> None:
    call = CALLED["object"][1]
    model = nn.Sequential(Holder(Branching(), call), Holder(Straight(), call), Holder(Asking(), call))
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    assert [site.name for site in plan] == ["1.relu"]
    assert {(refusal.owner, refusal.activation) for refusal in plan.refusals} == {
        ("0", "relu"), ("2", "relu"), ("2", "tanh")
    }  # fmt: skip


class Irregular(tuple[Any, ...]):
    """A tuple that does not say how long it is."""

    def __len__(self) -> int:
        raise NotImplementedError


def test_a_container_may_refuse_to_say_its_length() -> None:
    model = Holder(Irregular([Branching()]), lambda s, held, x: s.b(torch.relu(s.a(x))))
    assert [site.activation for site in bypass_fx.plan(model, mode="all")] == ["relu"]


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class Further(Apart):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def test_activations_of_modules_in_a_plain_list_are_listed() -> None:
    """They are no part of the model, so they get no D; nor are their weights trained with it."""
    model = Holder([[Further()], [nn.Sequential(nn.Tanh())]], lambda s, held, x: held[1][0](held[0][0](x)))
    plan = bypass_fx.plan(model, mode="all")
    assert not plan.sites and {refusal.activation for refusal in plan.refusals} == {"relu", "tanh"}
    assert "is not its child" in plan.refusals[0].reason


class Entry(dict[str, Any]):
    """An entry of a table, whose items are read as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


TABLE = {
    "linear": Entry(function=lambda x, **_: x, gain=1.0),
    "lrelu": Entry(function=lambda x, slope, **_: F.leaky_relu(x, slope), gain=math.sqrt(2)),
    "plain": [{"function": torch.tanh}],
}


class ByTable(nn.Module):
    """Looks its activation up, and does what no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), "lrelu"

    def forward(self, x: Tensor) -> Tensor:
        entry: Any = TABLE[self.act]
        return entry.function(self.fc(x), slope=0.2) * (entry.gain + sum(range(len(x))))  # type: ignore[no-any-return]


def test_activations_in_the_entries_of_a_table_are_listed() -> None:
    plan = bypass_fx.plan(ByTable(), mode="all", example_inputs=(X,))
    assert not plan.sites and {refusal.activation for refusal in plan.refusals} == {"leaky_relu", "tanh"}
