"""`with` blocks in what a forward calls: what they do to the calls inside is in no graph, so such a forward has none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bypass_fx

X = torch.randn(3, 4)


class Owner(nn.Module):
    """W → σ → A, with σ in a helper."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.guarded = nn.Linear(4, 6), nn.Linear(6, 3), True

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.helper(self.first(x)))  # type: ignore[no-any-return]

    def helper(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Doubling(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * (2 if "relu" in str(func) else 1)


class Swallowing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> bool:
        return True


class Counting:
    entered = 0

    def __enter__(self) -> None:
        Counting.entered += 1

    def __exit__(self, *error: object) -> None: ...


class InADispatchMode(Owner):
    def helper(self, z: Tensor) -> Tensor:
        with Doubling():
            return F.relu(z)


def counted(z: Tensor) -> Tensor:
    with Counting():
        return F.relu(z)


class InAFunction(Owner):
    def helper(self, z: Tensor) -> Tensor:
        return counted(z)


class TriedInside(Owner):
    def helper(self, z: Tensor) -> Tensor:
        with Counting():
            try:
                z = F.relu(z)
            finally:
                self.guarded  # noqa: B018
        return z


class OnADevice(Owner):
    def helper(self, z: Tensor) -> Tensor:
        with torch.device("meta"):
            made = torch.zeros(6)
        return F.relu(z) * (2.0 if made.is_meta else 3.0)


class Swallows(Owner):
    def helper(self, z: Tensor) -> Tensor:
        z = F.relu(z)
        with Swallowing():
            z += torch.ones(2, 7)
        return z


class WithGradients(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.second(F.relu(self.first(z)))  # type: ignore[no-any-return]


class Decorated(WithGradients):
    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def helper(self, z: Tensor) -> Tensor:
        return self.second(F.relu(self.first(z)))  # type: ignore[no-any-return]


class SwitchesGradientsOn(WithGradients):
    def helper(self, z: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return self.second(F.relu(self.first(z)))  # type: ignore[no-any-return]


class EntersByHand(Owner):
    def helper(self, z: Tensor) -> Tensor:
        mode = Doubling()
        mode.__enter__()  # type: ignore[no-untyped-call]
        z = F.relu(z)
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return z


def results(net: nn.Module) -> list[tuple[Tensor, bool]]:
    """What the model returns, and whether it has a gradient, with gradients and without."""
    found = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            y = net(X)
        found.append((y.detach(), y.requires_grad))
    return found


def same(net: nn.Module, before: list[tuple[Tensor, bool]]) -> bool:
    pairs = zip(before, results(net), strict=True)
    return all(torch.equal(one, other) and had == has for (one, had), (other, has) in pairs)


IN_HELPER = r"enters a `with` block \(in `helper`\)"


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (InAFunction, r"enters a `with` block \(in `counted`\)"),
        (TriedInside, IN_HELPER),
        (OnADevice, IN_HELPER),
        (Swallows, IN_HELPER),
        (WithGradients, IN_HELPER),
        (Decorated, r"enters a `with` block \(in `decorate_context`\)"),
        (SwitchesGradientsOn, "switches gradients on or off"),
        (InADispatchMode, "enters a dispatch mode"),
        (EntersByHand, "enters a dispatch mode"),
    ],
)
def test_what_a_context_does_to_the_calls_inside_is_not_lost(cls: type[Owner], why: str) -> None:
    net = cls()
    before = results(net)
    with pytest.raises(bypass_fx.BypassError, match=why):
        bypass_fx.extend(net, mode="all")
    assert type(net) is cls and same(net, before)


class Locked(Owner):
    lock = threading.Lock()

    def helper(self, z: Tensor) -> Tensor:
        with self.lock:
            scale = 2.0
        return F.relu(z) * scale


class NotEntered(Owner):
    def helper(self, z: Tensor) -> Tensor:
        if not self.guarded:
            with Doubling():
                z = z + 1
        return F.relu(z)


class AfterTheBlock(Owner):
    def helper(self, z: Tensor) -> Tensor:
        try:
            with Counting():
                scale = 2.0
            return F.relu(z) * scale
        finally:
            self.guarded  # noqa: B018


class Doubled:
    def __init__(self, z: Tensor) -> None:
        self.z = z

    @cached_property
    def value(self) -> Tensor:
        return self.z * 2


class ACachedProperty(Owner):
    def helper(self, z: Tensor) -> Tensor:
        return F.relu(Doubled(z).value)


@pytest.mark.parametrize(
    ("cls", "call"), [(ACachedProperty, "relu"), (Locked, "mul"), (NotEntered, "relu"), (AfterTheBlock, "mul")]
)
def test_a_block_that_holds_no_call_of_the_graph_is_as_ever(cls: Callable[[], Owner], call: str) -> None:
    net = cls()
    before = results(net)
    bypass_fx.extend(net, mode="all")
    assert [site.name for site in bypass_fx.sites(net)] == [call]
    assert same(net, before)
