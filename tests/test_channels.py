"""The channel axis and width by provenance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.channels import Channels, Provenance
from bypass_fx.passes.units import Spot


class Net(nn.Module):
    """Applies a function of (module, x) whose activation's channels are asked for."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.conv, self.fc, self.fc2 = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 4)
        self.bn, self.gn, self.ln = nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm(6)
        self.instance, self.with_weights = nn.InstanceNorm2d(64), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


CASES: dict[str, tuple[Callable[[Net, Tensor], Tensor], int, int]] = {
    "conv": (lambda m, x: F.relu(m.conv(x)), 8, -3),
    "batchnorm": (lambda m, x: F.relu(m.bn(x)), 8, 1),
    "groupnorm": (lambda m, x: F.relu(m.gn(x)), 8, 1),
    "instance norm made for another number": (lambda m, x: F.relu(m.instance(m.conv(x))), 8, -3),
    "instance norm that alone tells": (lambda m, x: F.relu(m.instance(x.exp())), 64, 1),
    "instance norm with weights": (lambda m, x: F.relu(m.with_weights(x)), 8, 1),
    "layernorm": (lambda m, x: F.relu(m.ln(x)), 6, -1),
    "pool": (lambda m, x: F.relu(F.max_pool2d(m.conv(x), 2)), 8, -3),
    "permuted": (lambda m, x: F.relu(m.conv(x).permute(0, 2, 3, 1)), 8, -1),
    "pooled away": (lambda m, x: F.relu(m.conv(x).mean((2, 3))), 8, -1),
    "sum": (lambda m, x: F.relu(m.conv(x) + m.conv(x)), 8, -3),
    "scaled by a gate": (lambda m, x: F.relu(m.conv(x) * torch.softmax(m.conv(x), 1)), 8, -3),
    "concatenated": (lambda m, x: F.relu(torch.cat([m.conv(x), m.conv(x)], 1)), 16, -3),
    "one chunk": (lambda m, x: F.relu(m.conv(x).chunk(2, 1)[0]), 4, -3),
    "split": (lambda m, x: F.relu(m.fc(x).split([2, 4], dim=-1)[1]), 4, -1),
    "from the reader": (lambda m, x: m.fc2(F.relu(x.exp())), 6, -1),
}


@pytest.mark.parametrize("name", CASES)
def test_provenance_settles_axis_and_width(name: str) -> None:
    body, width, axis = CASES[name]
    site = bypass_fx.plan(Net(body), mode="all").sites[0]
    assert (site.width, site.channel_dim) == (width, axis)


def test_without_provenance_the_site_is_refused_with_the_way_out() -> None:
    plan = bypass_fx.plan(Net(lambda m, x: F.relu(x.exp())), mode="all")
    assert not plan.sites and "example_inputs" in plan.refusals[0].remedy


def test_a_run_tells_the_channels_of_every_activation_of_a_value() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        z = x.exp()
        return F.relu(z) + torch.sigmoid(z) + F.relu(-z)

    plan = bypass_fx.plan(Net(body), mode="all", example_inputs=(torch.zeros(2, 5),))
    assert [(site.activation, site.width) for site in plan.sites] == [("relu", 5), ("sigmoid", 5), ("relu", 5)]


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.roll(1, -1))


@pytest.mark.parametrize("asks", [lambda x: x.device.type == "cpu", lambda x: x.is_cpu, lambda x: x.device == x.device])
def test_a_run_that_tells_the_channels_is_on_the_device_that_the_forward_asks_for(
    asks: Callable[[Tensor], bool],
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(4, 6), Inner()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.inner(y) if asks(x) and not x.is_meta else self.inner(y.reshape(-1, 3))  # type: ignore[no-any-return]

    x = torch.randn(2, 4)
    plan = bypass_fx.plan(Net(), mode="all", example_inputs=(x,))
    assert [site.width for site in plan] == [6]


class Sharing(nn.Module):
    """One activation module for values of several shapes, called from a forward that has no graph."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.act, self.shapes = nn.SiLU(), shapes

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum()
        if total.isnan():
            return total
        for shape in self.shapes:
            total = total + self.act(x[: math.prod(shape)].view(shape)).sum()
        return total


@pytest.mark.parametrize(
    ("shapes", "width", "axis"),
    [
        ([(2, 8, 4, 4), (2, 8, 2, 2)], 8, 1),
        ([(6, 2, 4, 5), (2, 4, 5)], 5, -1),
        ([(2, 4, 5), (6, 2, 4, 5)], 5, -1),
        ([(2, 8), (2, 8, 4, 4)], 8, 1),
    ],
)
def test_the_channels_are_those_that_all_calls_have(shapes: list[tuple[int, ...]], width: int, axis: int) -> None:
    model, x = Sharing(*shapes), torch.randn(300)
    before = model(x)
    plan = bypass_fx.plan(model, mode="all", example_inputs=(x,))
    assert [(site.width, site.channel_dim) for site in plan] == [(width, axis)]
    assert torch.equal(bypass_fx.extend(model, plan)(x), before)


@pytest.mark.parametrize(
    "shapes", [[(2, 8, 4, 4), (2, 4, 4, 4)], [(2, 8, 4, 4), (2, 32)], [(2, 3), (2, 4)], [(1, 1), ()]]
)
def test_calls_without_channels_in_common_are_refused(shapes: list[tuple[int, ...]]) -> None:
    plan = bypass_fx.plan(Sharing(*shapes), mode="all", example_inputs=(torch.randn(300),))
    assert not plan.sites and f"none in common: {shapes[0]}, {shapes[1]}" in plan.refusals[0].reason


def test_a_single_number_has_no_channels() -> None:
    plan = bypass_fx.plan(Sharing(()), mode="all", example_inputs=(torch.randn(300),))
    assert not plan.sites and "a single number" in plan.refusals[0].reason


def test_a_hook_that_a_forward_sets_is_gone_after_a_run_and_the_model_still_runs() -> None:
    class Hooking(nn.Module):
        """Sets hooks when it is first called, as some do that collect what their blocks return."""

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner, self.hooked = nn.Linear(4, 6), Inner(), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.hooked:
                self.fc.register_forward_hook(lambda module, args, result: None)
                self.hooked = True
            return self.inner(self.fc(x).exp())  # type: ignore[no-any-return]

    net, x = Hooking(), torch.randn(2, 4)
    assert len(bypass_fx.plan(net, mode="all", example_inputs=(x,))) == 1
    assert not net.hooked and list(net.fc._forward_hooks.items()) == []
    before = net(x)
    assert torch.equal(net(x), before) and len(list(net.fc._forward_hooks.items())) == 1


class Balanced(nn.Module):
    """Rows and columns made to sum to one, in turns, and a loop: the module is called with what it has made."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            x = x / (x.sum(-1, keepdim=True) + 1e-6)
            x = x * (x.exp() / x.sqrt())
        return F.relu(x)


class Twice(nn.Module):
    """Calls a module twice, so that where its input comes from is a loop."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x.exp()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Balanced(20), Twice(Balanced(20))], ids=["once", "in a loop"])
def test_a_value_that_is_not_settled_is_walked_back_from_once(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[int] = []
    settle = Provenance.settle

    def counting(provenance: Provenance, spot: Spot) -> Channels | None:
        walked.append(1)
        assert len(walked) < 2000
        return settle(provenance, spot)

    monkeypatch.setattr(Provenance, "settle", counting)
    plan = bypass_fx.plan(model, mode="all")
    assert not plan.sites and len(plan.refusals) == 1 and walked
