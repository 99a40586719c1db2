"""Sequentials that a forward runs in parts: ψ belongs to the calls in it, and is not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of


class Net(nn.Module):
    """Two activations in one Sequential."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
        self.more = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))


class InParts(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[3:](self.net[:3](x))  # type: ignore[no-any-return]


class UntracedInParts(Net):
    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.net[0], self.net[1:]
        x = first(x)
        while len(x.shape) < 2:
            x = x[None]
        return rest(x)  # type: ignore[no-any-return]


class WholeAndInParts(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.net[:-1]
        return self.net(x) + features(x)[:, :2]  # type: ignore[no-any-return]


class Nested(Net):
    def forward(self, x: Tensor) -> Tensor:
        size = 1
        for each in self.more[:2]:
            x = each(x)[:, -4:] + self.more[0][:-size](x)[:, :4]
        return self.net(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [InParts, UntracedInParts, WholeAndInParts, Nested])
@pytest.mark.parametrize("mode", ["strict", "all"])
@pytest.mark.parametrize("given", [True, False])
def test_a_part_of_a_sequential_is_run_with_its_sites(kind: type[Net], mode: str, given: bool) -> None:
    net, x = kind(), torch.randn(3, 4)
    examples = (torch.randn(2, 4),) if given else None
    plan = bypass_fx.plan(net, mode=mode, example_inputs=examples)  # type: ignore[arg-type]
    if kind is UntracedInParts and not (given and mode == "all"):
        assert not [site for site in plan if site.name.startswith("net")]
        return
    names = [site.name for site in plan]
    assert plan.sites and len({*names}) == len(names)
    before = net(x)
    bypass_fx.extend(net, plan, example_inputs=examples)
    assert torch.equal(net(x), before)
    with torch.no_grad():
        for site in bypass_fx.sites(net):
            delta_of(net, site).fill_(0.3)
    assert not torch.allclose(net(x), before)
    assert len(bypass_fx.norms(net)) == len(names)
    with torch.no_grad():
        for site in bypass_fx.sites(net):
            delta_of(net, site).zero_()
    bypass_fx.contract(net)
    assert torch.equal(net(x), before)


def test_a_part_of_an_extended_sequential_is_refused() -> None:
    net = bypass_fx.extend(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert isinstance(net[0], nn.Linear)  # type: ignore[index]
    with pytest.raises(bypass_fx.BypassError, match="would lose its δ"):
        net[:2]  # type: ignore[index]


class Listing(nn.Sequential):
    """A slice of it is a list of its modules."""

    def __getitem__(self, key: Any) -> Any:
        return [*self._modules.values()][key]


class WithListing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Listing(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        for each in self.net[:1]:
            x = each(x)
        return x


def test_slices_of_a_sequential_that_are_no_parts_stay_what_they_are() -> None:
    net, x = WithListing(), torch.randn(3, 4)
    before = net(x)
    plan = bypass_fx.plan(net, mode="strict")
    assert [site.name for site in plan] == ["net.1"]
    bypass_fx.extend(net, plan)
    assert torch.equal(net(x), before)
