"""What a forward reads past the model's own modules, or in a way of its own, and what other threads do meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bypass_fx

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Switch(nn.Identity):
    log: list[Any] = []  # noqa: RUF012 - what is tested

    def __init__(self, on: bool = True) -> None:
        super().__init__()
        self.on = on


class Owner(nn.Module):
    """W and A with one of two activations between them."""

    def __init__(self, switch: Any = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.__dict__["switch"] = switch

    def is_on(self) -> bool:
        return bool(self.switch.on)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) if self.is_on() else torch.tanh(self.a(x)))  # type: ignore[no-any-return]


class InAList(Owner):
    def is_on(self) -> bool:
        return bool(self.switch[0].on)


class ByGetattr(Owner):
    def __getattr__(self, name: str) -> Any:
        return self.__dict__["switch"] if name == "state" else super().__getattr__(name)

    def is_on(self) -> bool:
        return bool(self.state)


class ByGetattribute(Owner):
    def __getattribute__(self, name: str) -> Any:
        return (
            object.__getattribute__(self, "__dict__")["switch"]
            if name == "state"
            else object.__getattribute__(self, name)
        )

    def is_on(self) -> bool:
        return bool(self.state)


class ModeOfAnother(Owner):
    def is_on(self) -> bool:
        return bool(self.switch.training)


class ModeByGetattribute(Owner):
    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)

    def is_on(self) -> bool:
        return self.training


def outside() -> nn.Module:
    return nn.Sequential(Owner(Switch(True)), Owner(Switch(False)), InAList([Switch(True)]), InAList([Switch(False)]))


def elsewhere() -> nn.Module:
    on, off = Switch(True), Switch(False)
    return nn.Sequential(on, off, Owner(on), Owner(off))


def own_ways() -> nn.Module:
    return nn.Sequential(ByGetattr(True), ByGetattr(False), ByGetattribute(True), ByGetattribute(False))


def modes() -> nn.Module:
    switch = Switch()
    return nn.Sequential(switch, ModeOfAnother(switch), ModeByGetattribute(), nn.ReLU(), nn.Linear(4, 4))


@pytest.mark.parametrize("make", [outside, elsewhere, own_ways, modes])
def test_blocks_that_read_different_things_stay_what_they_are(make: Callable[[], nn.Module]) -> None:
    net = make()
    before = [net.train(mode)(X) for mode in (True, False)]
    bypass_fx.extend(net.train(), mode="all")
    assert all(torch.equal(net.train(mode)(X), y) for mode, y in zip((True, False), before, strict=True))


class Logs(Owner):
    def forward(self, x: Tensor) -> Tensor:
        self.switch.log.append(x)
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


def test_a_list_of_the_class_of_a_module_outside_the_model_is_left_alone() -> None:
    with pytest.raises(bypass_fx.BypassError, match="its forward changes a list that outlives the call"):
        bypass_fx.extend(Logs(Switch()), mode="all")
    assert Switch.log == []


@pytest.fixture
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching_often")
def test_threads_extend_models_of_their_own() -> None:
    hooked = (nn.Module, nn.Linear, nn.Sequential, Owner)
    before = [dict(vars(cls)) for cls in hooked]
    nets = [nn.Sequential(*(Owner(Switch(bool((i + j) % 2))) for i in range(6))) for j in range(3)]
    failures: list[BaseException] = []

    def work(net: nn.Module) -> None:
        try:
            for _ in range(5):
                y = net(X)
                assert torch.equal(bypass_fx.extend(net, mode="all")(X), y)
                bypass_fx.contract(net)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [dict(vars(cls)) for cls in hooked] == before


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_linear_is_the_w_of_its_site() -> None:
    net = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.ReLU(), nn.Linear(4, 4))
    (site,) = bypass_fx.plan(net, mode="all").sites
    assert site.first is not None and site.first.weight == "0._orig_mod.weight"
