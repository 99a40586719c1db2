"""Modules that a forward makes in every call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.errors import SurgeryError, UntraceableError
from bypass_fx.passes.trace import Tracing


class Owner(nn.Module):
    """Has a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)


class Leaky(nn.Module):
    """Holds a setting."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)


class Squashes(Owner):
    """Makes what it calls, anew in every call."""

    steepness = 0.25

    def forward(self, x: Tensor) -> Tensor:
        softmax = nn.Softmax(dim=-1)
        softmax.dim = x.dim() - 1
        curve = nn.Sequential(Leaky(self.steepness), nn.Dropout(0.5))
        return x + softmax(curve(self.fc(x)))  # type: ignore[no-any-return]


def test_a_module_that_the_forward_makes_may_hold_settings() -> None:
    net, x = Squashes(), torch.randn(2, 3)
    before = []
    for mode in (True, False):  # the new Dropout is in training mode whatever the mode of the model
        torch.manual_seed(0)
        before.append(net.train(mode)(x))
    bypass_fx.extend(net, mode="all")
    assert [site.activation for site in bypass_fx.sites(net)] == ["leaky_relu"]
    for mode, expected in zip((True, False), before, strict=True):
        torch.manual_seed(0)
        assert torch.equal(net.train(mode)(x), expected)
    with pytest.raises(SurgeryError, match="rewritten for the present value of `steepness`"):
        net.steepness = 0.5


def test_what_a_forward_read_to_make_one_is_noted() -> None:
    net, x = Squashes(), torch.randn(2, 3)
    bypass_fx.extend(net, mode="all")
    Squashes.steepness = 0.5
    try:
        torch.manual_seed(0)
        found = net(x)
        bypass_fx.contract(net)
        torch.manual_seed(0)
        assert torch.equal(found, net(x))
    finally:
        Squashes.steepness = 0.25


class MakesALinear(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return x + nn.Linear(3, 3)(F.silu(self.fc(x)))  # type: ignore[no-any-return]


class KeepsWhatItMakes(Owner):
    def forward(self, x: Tensor) -> Tensor:
        self.curve = nn.SiLU()
        return x + self.curve(self.fc(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [MakesALinear, KeepsWhatItMakes])
def test_a_new_module_with_weights_or_one_that_stays_ends_the_trace(kind: type[Owner]) -> None:
    with pytest.raises(UntraceableError, match=r"does not trace|sets the attribute"):
        Tracing(kind()).trace("")
