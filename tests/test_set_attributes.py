"""Forwards that set attributes of their module: what they set is there after the call, and no trace leaves its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bypass_fx
from bypass_fx.passes.errors import UntraceableError
from bypass_fx.passes.trace import Tracing


class Base(nn.Module):
    """Linear, activation, Linear, for forwards that set attributes on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.kept: Any = None


class Keeps(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x * 2
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class KeepsTheResult(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(x)))
        self.kept, self.shape = (y, {"mean": y.mean()}), y.shape
        return y  # type: ignore[no-any-return]


class KeepsAList(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = []
        for layer in (self.fc1, F.silu, self.fc2):
            x = layer(x)
            self.kept.append(x)
        return x + len(self.kept)


class ReadsWhatItWrote(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.fc1(x)
        self.hidden = F.gelu(self.kept)
        assert hasattr(self, "hidden")
        return self.fc2(self.hidden) + self.kept.mean()


class KeepsInTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.kept = x.mean()
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class KeepsSometimes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc1(x))
        if x.sum() > 0:
            self.kept = x.sum()
        return self.fc2(y)  # type: ignore[no-any-return]


class Hides(Base):
    def helper(self, x: Tensor) -> Tensor:
        self.kept = x
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.helper(self.fc1(x)))  # type: ignore[no-any-return]


ALL = [Keeps, KeepsTheResult, KeepsAList, ReadsWhatItWrote, KeepsInTraining, KeepsSometimes, Hides]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _flat(item)]
    return [leaf for item in value.values() for leaf in _flat(item)] if isinstance(value, dict) else [value]


def _same(one: Any, other: Any) -> bool:
    pairs = zip(_flat(one), _flat(other), strict=True)
    return all(a is None if b is None else torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_what_a_forward_sets_is_there_after_a_call(kind: type[Base], training: bool) -> None:
    plain = kind().train(training)
    extended = bypass_fx.extend(copy.deepcopy(plain), mode="all")
    assert bypass_fx.sites(extended)
    for x in (torch.ones(2, 4), -torch.ones(3, 4)):
        assert torch.equal(plain(x), extended(x))
        assert vars(plain).keys() == vars(extended).keys() - {"_bypass_plan"}
        for name in ("kept", "shape", "hidden"):
            if name in vars(plain):
                assert _same(getattr(plain, name), getattr(extended, name)), name
    bypass_fx.contract(extended)
    assert type(extended) is kind and torch.equal(plain(x), extended(x))


def test_a_trace_leaves_nothing_behind() -> None:
    for kind in ALL:
        net = kind()
        before = dict(vars(net))
        graph = Tracing(net).trace("").graph
        assert dict(vars(net)) == before
        assert any(node.target is setattr for node in graph.nodes) or kind is KeepsSometimes


def test_it_compiles_whole() -> None:
    net = bypass_fx.extend(KeepsAList(), mode="all")
    x = torch.randn(2, 4)
    right = net(x)
    kept = [each.detach() for each in net.kept]
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), right) and _same(net.kept, kept)


def test_what_is_kept_of_psi_must_not_change_when_it_leaves() -> None:
    """σ(z) + D z is looked at elsewhere: only with D = 0 is that what it was."""
    sites = bypass_fx.plan(ReadsWhatItWrote()), bypass_fx.plan(Keeps())
    assert [site.constraint for site in sites[0]] == ["zero"] and [site.constraint for site in sites[1]] == ["folded"]


class KeepsHiddenInEval(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc1(x))
        if not self.training:
            self.kept = 2 * y
        return self.fc2(y)  # type: ignore[no-any-return]


def test_what_one_mode_alone_keeps_parts_the_modes_only_where_psi_is_read() -> None:
    sites = bypass_fx.plan(KeepsInTraining()), bypass_fx.plan(KeepsHiddenInEval(), mode="all")
    assert [site.constraint for site in sites[0]] == ["folded"] and [site.constraint for site in sites[1]] == ["zero"]


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = (self.kept or 0) + 1
        return self.fc2(F.relu(self.fc1(x))) * self.kept  # type: ignore[no-any-return]


class MakesOnce(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = x.mean()
        return self.fc2(F.relu(self.fc1(x))) * self.scale  # type: ignore[no-any-return]


class RemembersForEval(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.kept = 2.0
            return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]
        return self.fc2(F.relu(self.fc1(x))) * self.kept  # type: ignore[no-any-return]


class ReadsInOneBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.relu(self.fc1(x)))
        if x.sum() > 0:
            self.kept = 3.0
            return y  # type: ignore[no-any-return]
        return y * (self.kept or 1.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Counts, MakesOnce, RemembersForEval, ReadsInOneBranch])
def test_what_one_call_leaves_for_the_next_is_no_constant(kind: type[Base]) -> None:
    net = kind()
    before = dict(vars(net))
    with pytest.raises(UntraceableError, match=r"reads the attribute `\w+` that a call before it has set"):
        Tracing(net).trace("")
    assert dict(vars(net)) == before


class SetsABuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.running = x.mean(0)
        return self.fc1(x)  # type: ignore[no-any-return]


class SetsAParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.last_weight = self.fc1.weight
        return self.fc1(x)  # type: ignore[no-any-return]


class SetsAChildS(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.fc1.seen = x
        return self.fc1(x)  # type: ignore[no-any-return]


class SetsTheMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.training = False
        return self.fc1(x)  # type: ignore[no-any-return]


class SetsByAProperty(Base):
    @property
    def doubled(self) -> Any:
        return self.kept

    @doubled.setter
    def doubled(self, value: Tensor) -> None:
        self.kept = 2 * value

    def forward(self, x: Tensor) -> Tensor:
        self.doubled = x
        return self.fc1(x)  # type: ignore[no-any-return]


class SetsInItsOwnWay(Base):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return self.fc1(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", [SetsABuffer, SetsAParameter, SetsAChildS, SetsTheMode, SetsByAProperty, SetsInItsOwnWay]
)
def test_what_is_more_than_keeping_a_value_under_a_name_is_refused(kind: type[Base]) -> None:
    net = kind()
    with pytest.raises(UntraceableError, match="sets the attribute"):
        Tracing(net).trace("")
    assert net.training and "seen" not in vars(net.fc1)


class Attention(nn.Module):
    """Keeps its weights to be looked at, as annotated transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = (layer(x).view(n, -1, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        self.weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return self.out((self.weights @ v).transpose(1, 2).reshape(n, -1, 8))  # type: ignore[no-any-return]


def test_attention_that_keeps_its_weights_is_a_site() -> None:
    plain, x = Attention(), torch.randn(2, 5, 8)
    extended = bypass_fx.extend(copy.deepcopy(plain))
    assert [(site.kind, site.activation) for site in bypass_fx.sites(extended)] == [("strict", "attention")]
    assert torch.equal(plain(x), extended(x))
    assert plain.weights is not None and torch.equal(plain.weights, extended.weights)


class Masked(Attention):
    """CLIP's blocks bring their mask to the device of the values in every call, where they have one."""

    mask: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.mask = self.mask.to(x) if self.mask is not None else None
        return super().forward(x) if self.mask is None else x


def test_an_attribute_may_be_set_to_the_constant_that_it_was_read_to_hold() -> None:
    plain, x = Masked(), torch.randn(2, 5, 8)
    plain.mask = None
    extended = bypass_fx.extend(copy.deepcopy(plain))
    assert [(site.kind, site.activation) for site in bypass_fx.sites(extended)] == [("strict", "attention")]
    assert torch.equal(plain(x), extended(x)) and extended.mask is None
    with pytest.raises(bypass_fx.SurgeryError, match="rewritten for the present value of `mask`"):
        extended.mask = torch.ones(5, 5)


def test_an_error_on_the_way_leaves_what_was_set_before() -> None:
    extended = bypass_fx.extend(Keeps())
    extended(torch.ones(2, 4))
    kept = extended.kept
    with pytest.raises(RuntimeError):
        extended(torch.ones(2, 5))
    assert extended.kept is kept
