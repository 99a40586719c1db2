"""What a forward leaves for others, or others for it: attributes, lists and dicts that somebody else sees in the same call,
or in the next one. Such a forward has no graph: the extended model does what the plain one does, for call after call.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bypass_fx
from bypass_fx.passes.errors import UntraceableError
from bypass_fx.passes.trace import Tracing


class Base(nn.Module):
    """Linear, activation, Linear, by a helper method, which has a graph whatever the forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.kept: Any = None
        self.prepare()

    def prepare(self) -> None:
        """More of it."""

    def core(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class LooksUp(nn.Module):
    """Reads what the module around it has set."""

    def __init__(self, around: list[nn.Module]) -> None:
        super().__init__()
        self.around, self.layer = around, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.around[0].kept
        return self.layer(x) * (1 if kept is None else kept)  # type: ignore[no-any-return]


class AChildLooks(Base):
    def prepare(self) -> None:
        self.child = LooksUp([self])

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.mean()
        return self.core(self.child(x))


class AHookLooks(Base):
    def prepare(self) -> None:
        self.fc1.register_forward_hook(lambda module, args, out: out * (1 if self.kept is None else 2))

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.mean()
        return self.core(x)


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
        found.append(x.mean())
        return self.layer(x)  # type: ignore[no-any-return]


class HandsOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Appends()

    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
        return torch.tanh(self.inner(x, found))


class AChildFillsAList(Base):
    def prepare(self) -> None:
        self.children_of_it = nn.ModuleList([HandsOn(), Appends()])

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for child in self.children_of_it:
            x = child(x, found)
        return self.core(x) + sum(found)


class AChildAddsToAList(Base):
    def prepare(self) -> None:
        self.child = Appends()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = [x]
        return self.core(self.child(x, found)), found


class AChildFillsWhatIsKept(Base):
    def prepare(self) -> None:
        self.child = Appends()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = []
        return self.core(self.child(x, self.kept))


class ReturnsWhatItKeeps(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.kept = [x]
        return self.core(x), self.kept


class ChangesWhatIsReturned(Base):
    def prepare(self) -> None:
        self.child = ReturnsWhatItKeeps()

    def forward(self, x: Tensor) -> Tensor:
        y, kept = self.child(x)
        kept.append(y)
        return self.core(y)


class LooksAtItsDict(Base):
    def forward(self, x: Tensor) -> Tensor:
        if "seen" in self.__dict__:
            x = x * 2
        self.seen = True
        return self.core(x)


class LooksAtItsVars(Base):
    def forward(self, x: Tensor) -> Tensor:
        count = vars(self).get("count", 0)
        self.count = count + 1
        return self.core(x) * count


class WritesItsDict(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        return self.core(x)


class WritesPastItsClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "kept", 7)
        return self.core(x)


class Deletes(Base):
    def prepare(self) -> None:
        self.first = True

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "first"):
            del self.first
            return self.core(x)
        return self.core(x * 2)


class CountsInATensor(Base):
    def prepare(self) -> None:
        self.count = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.core(x)


class CountsInATensorByName(Base):
    def prepare(self) -> None:
        self.count = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.core(x)


class State:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None


class KeepsInSlots(Base):
    def prepare(self) -> None:
        self.state = State()

    def forward(self, x: Tensor) -> Tensor:
        self.state.value = x
        return self.core(x)


class LeavesANumber(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = float(x.shape[0])
        return self.core(x)


class ReadsAnotherS(Base):
    def prepare(self) -> None:
        self.others: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) * (self.others[0].kept or 1)


class ReadsASibling(Base):
    def prepare(self) -> None:
        self.one, self.other = LeavesANumber(), ReadsAnotherS()
        self.other.others.append(self.one)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.other(self.one(x)))  # type: ignore[no-any-return]


class SetsByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        setattr(self, "kept", x.mean())  # noqa: B010  # what is tested
        return self.core(x)


class FillsItsDict(Base):
    def prepare(self) -> None:
        self.kept = {"loss": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["loss"] = x.mean()
        return self.core(x)


class FillsItsList(Base):
    def prepare(self) -> None:
        self.kept = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.clear()
        self.kept.append(x.mean())
        return self.core(x)


def _reading(child: type[Base], read: Callable[[Any], Any]) -> type[Base]:
    class ReadsItsChild(Base):
        def prepare(self) -> None:
            self.child = child()

        def forward(self, x: Tensor) -> Tensor:
            x = self.child(x)
            return self.core(x) + read(self.child.kept)

    return ReadsItsChild


class ReadsInOneWay(Base):
    """Called in one way it sets an attribute, and in another it reads it."""

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        if again:
            return self.core(x) * (1 if self.kept is None else self.kept)
        self.kept = x.shape[0]
        return self.core(x)


class TracesInOneWay(Base):
    def prepare(self) -> None:
        self.kept = []

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        if again:
            self.kept.append(1)
        return self.core(x)


def _calling(child: type[Base]) -> type[Base]:
    class CallsInTwoWays(Base):
        def prepare(self) -> None:
            self.child = child()

        def forward(self, x: Tensor) -> Tensor:
            return self.core(self.child(self.child(x), again=True))

    return CallsInTwoWays


ALL = [
    *(AChildLooks, AHookLooks, AChildFillsAList, AChildAddsToAList, AChildFillsWhatIsKept, ChangesWhatIsReturned),
    *(LooksAtItsDict, LooksAtItsVars, WritesItsDict, WritesPastItsClass, Deletes, ReadsASibling, KeepsInSlots),
    *(CountsInATensor, CountsInATensorByName, _reading(SetsByName, lambda kept: kept)),
    *(_reading(FillsItsDict, lambda kept: kept["loss"]), _reading(FillsItsList, sum)),
    *(_calling(ReadsInOneWay), _calling(TracesInOneWay)),
]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, State):
        return _leaves(value.value)
    return _leaves(list(value.values())) if isinstance(value, dict) else [value]


def _left(model: nn.Module) -> list[Any]:
    names = ("kept", "count", "seen", "first", "state")
    held = (vars(module).get(name) for module in model.modules() for name in names)
    return [leaf for value in held for leaf in _leaves(value)]


def _expect_same(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("kind", ALL)
def test_call_after_call_is_as_without_d(kind: type[Base]) -> None:
    torch.manual_seed(0)
    plain = kind()
    extended = copy.deepcopy(plain)
    for one, other in zip(plain.fc1._forward_hooks, extended.fc1._forward_hooks, strict=True):
        extended.fc1._forward_hooks[other] = lambda module, args, out: out * (1 if extended.kept is None else 2)
        assert one == other
    before = _left(extended)
    bypass_fx.extend(extended, mode="all")
    assert bypass_fx.sites(extended)
    _expect_same(before, _left(extended))
    for x in (torch.ones(2, 4), -torch.ones(3, 4), torch.full((2, 4), 0.5)):
        _expect_same(_leaves(plain(x)), _leaves(extended(x)))
        _expect_same(_left(plain), _left(extended))


class KeepsX(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return self.core(x)


def test_one_of_equal_blocks_may_be_looked_at() -> None:
    blocks = nn.Sequential(KeepsX(), KeepsX())
    tracing, second = Tracing(blocks), blocks[1]
    second.fc2.register_forward_pre_hook(lambda module, args: print(second.kept))
    assert any(node.target is setattr for node in tracing.trace("0").graph.nodes)
    with pytest.raises(UntraceableError, match="calls fc2, which may look at them"):
        tracing.trace("1")


_COUNT = itertools.count()


class KeepsTheTime(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = {"at": next(_COUNT), "of": "x"}
        return self.core(x)


def test_what_is_another_number_in_each_run_is_no_constant() -> None:
    with pytest.raises(UntraceableError, match="sets the attribute `kept` to something else at each call"):
        Tracing(KeepsTheTime()).trace("")


def test_a_call_in_another_way_that_reads_what_was_set_is_refused_when_it_comes() -> None:
    net, x = bypass_fx.extend(ReadsInOneWay(), mode="all"), torch.ones(2, 4)
    net(x)
    with pytest.raises(bypass_fx.BypassError, match="does not leave `kept` as a call in another way has it"):
        net(x, again=True)
    net(torch.ones(3, 4))
    assert net.kept == 3


class ReadsAProperty(Base):
    def prepare(self) -> None:
        self.scale = 2.0

    @property
    def doubled(self) -> float:
        return self.scale * 2

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [x]
        return self.core(x) * self.doubled


def test_what_stands_in_no_one_else_s_way_has_a_graph() -> None:
    assert any(node.target is setattr for node in Tracing(ReadsAProperty()).trace("").graph.nodes)
