"""Forwards that go by what their children return: None, or a tuple as a whole."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import bypass_fx
from bypass_fx.surgery import delta_of

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Returns a residual path and a skip path; the last one has no residual path."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.fc, self.out, self.last = nn.Linear(8, 8), nn.Linear(8, 8), last

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        y = torch.relu(self.fc(x))
        return (None if self.last else self.out(y)), y


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.act, self.out = nn.ModuleList([Block(), Block(last=True)]), nn.Tanh(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        total = torch.zeros_like(x)
        for block in self.blocks:
            residual, skip = block(x)
            if residual is not None:
                x = x + residual
            total = total + skip
        return self.out(self.act(total))


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class Asking(nn.Module):
    """Adds what a child returns, if it returns something."""

    def __init__(self, child: nn.Module, **passed: Any) -> None:
        super().__init__()
        self.child, self.passed, self.fc, self.out = child, passed, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.out(torch.relu(self.fc(x)))
        returned = self.child(x, x, x, **self.passed)[1] if self.passed else self.child(x)
        return y * 2 if returned is None else y + returned.mean()


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        return {"x": x, "aux": None}


class AskingByName(Asking):
    def forward(self, x: Tensor) -> Any:
        y = self.out(torch.relu(self.fc(x)))
        aux = self.child(x)["aux"]
        return y * 2 if aux is None else y + aux


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x


class TakingApart(Asking):
    """Takes whatever its child returns apart, and puts it together again."""

    def forward(self, x: Tensor) -> Any:
        (first, *rest), form = tree_flatten(self.child(x))
        return tree_unflatten([self.out(torch.relu(self.fc(first))), *rest], form)[0]


MODELS: dict[str, Any] = {
    "residual": Skipping,
    "nothing": lambda: Asking(Silent()),
    "something": lambda: Asking(nn.Linear(8, 8)),
    "weights": lambda: Asking(nn.MultiheadAttention(8, 2), need_weights=True),
    "no weights": lambda: Asking(nn.MultiheadAttention(8, 2), need_weights=False),
    "dict": lambda: AskingByName(Named()),
    "whole": lambda: TakingApart(Pair()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_may_go_by_what_its_children_return(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    before = model(X)
    bypass_fx.extend(model, mode="all")
    assert torch.equal(model(X), before)
    with torch.no_grad():
        for site in bypass_fx.sites(model):
            delta_of(model, site).fill_(0.5)
    assert not torch.equal(model(X), before)


class Between(nn.Module):
    """Returns more where it is asked for more."""

    def forward(self, x: Tensor, more: bool = False) -> tuple[Tensor, Tensor | None]:
        return x, x if more else None


def test_calls_of_one_child_that_return_different_things_are_refused() -> None:
    class Twice(Asking):
        def forward(self, x: Tensor) -> Any:
            y = self.out(torch.relu(self.fc(x)))
            for more in (False, True):
                _, returned = self.child(x, more)
                y = y if returned is None else y + returned
            return y

    plan = bypass_fx.plan(Twice(Between()), mode="all")
    assert not plan.sites and "may go by what child returns" in plan.refusals[0].reason


def test_what_children_return_is_asked_of_each_owner_anew() -> None:
    one, other = Asking(Silent()), Asking(nn.Linear(8, 8))
    model = nn.Sequential(one, other)
    before = model(X)
    assert torch.equal(bypass_fx.extend(model, mode="all")(X), before)


class Unseen(Pair):
    """Returns a pair that no graph shows."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with nullcontext():
            return super().forward(x)


def test_where_a_graph_does_not_run_the_refusal_says_so_and_other_activations_are_sites() -> None:
    class Rolling(Asking):
        def forward(self, x: Tensor) -> Any:
            (first, *rest), form = tree_flatten(self.child(x))
            return tree_unflatten([torch.relu(first.roll(1, -1)), *rest], form)[0]

    class Rolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x.roll(1, -1))

    plan = bypass_fx.plan(nn.Sequential(Rolling(Unseen()), Rolled()), mode="all", example_inputs=(X,))
    assert [site.name for site in plan] == ["1.tanh"]
    assert "its graph does not run on what the model passes (AttributeError" in plan.refusals[0].reason
    assert "split the forward" in plan.refusals[0].remedy
