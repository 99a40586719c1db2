"""Forwards that do one thing in training mode and another in eval mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import bypass_fx
from tests.invariants.test_generated import expect_exact_fold, on_the_variety


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu(self.fc1(x)))
        return out


class ReadInEval(nn.Module):
    """In eval mode it gives A something else to read, too."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.mlp, self.by_name = Mlp(), by_name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        if not self.training:
            y = y + (self.mlp.fc2.bias if self.by_name else self.mlp.fc2(x.repeat(1, 2)))
        return y


def test_a_bias_that_eval_mode_alone_reads_elsewhere_too_is_not_folded_into() -> None:
    for by_name in (False, True):
        (site,) = bypass_fx.plan(ReadInEval(by_name), mode="strict").sites
        assert site.constraint == "augmented"


class WithWeights(nn.Module):
    """In eval mode it computes something beside the path from W to A, as attention does that returns its weights then."""

    def __init__(self, dropped: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop, self.dropped = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(), dropped
        self.wrapped = Wrapped()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weights = None if self.training else x.softmax(-1)
        h = self.wrapped(F.relu(self.fc1(x)))
        return self.fc2(self.drop(h) if self.dropped else h), weights


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


@pytest.mark.parametrize("dropped", [False, True])
def test_a_forward_that_computes_something_else_too_in_eval_mode_has_its_strict_sites(dropped: bool) -> None:
    model = WithWeights(dropped)
    (site,) = bypass_fx.plan(model, mode="strict").sites
    assert (site.constraint, site.exact) == ("folded", "eval" if dropped else "always")
    x = torch.randn(3, 4)
    before = {train: seeded(model.train(train), x) for train in (True, False)}
    bypass_fx.extend(model, mode="strict")
    assert all(torch.equal(seeded(model.train(train), x), before[train]) for train in (True, False))
    assert on_the_variety(model.eval(), bypass_fx.sites(model)[0])
    moved = seeded(model, x)
    bypass_fx.contract(model)
    torch.testing.assert_close(seeded(model, x), moved)


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    out: Tensor = model(x)[0]
    return out


class AnotherEnd(WithWeights):
    """In eval mode the result goes elsewhere too, behind what a child handed on."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.wrapped(F.relu(self.fc1(x)))
        return self.fc2(h), None if self.training else h.sum()


class AnotherStart(WithWeights):
    """In eval mode the activation's input comes from another map."""

    def __init__(self, dropped: bool) -> None:
        super().__init__(dropped)
        self.other = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.wrapped(self.fc1(x) if self.training else self.other(x))
        return self.fc2(F.relu(h)), None


class MovedInEval(WithWeights):
    """In eval mode other calls have the names of training mode's."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.training:
            x = F.relu(x)
        return self.fc2(F.relu(self.fc1(x))), None


@pytest.mark.parametrize("kind", [AnotherEnd, AnotherStart, MovedInEval])
def test_a_path_that_goes_another_way_in_eval_mode_is_not_strict(kind: type[WithWeights]) -> None:
    plan = bypass_fx.plan(kind(False), mode="strict")
    assert not plan.sites and all("eval mode" in refusal.reason for refusal in plan.refusals)


class Inner(nn.Module):
    """An activation with the map behind it, or in front of it."""

    def __init__(self, map_behind: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.map_behind = map_behind

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(x)) if self.map_behind else F.relu(self.fc(x))  # type: ignore[no-any-return]


class Mixing(nn.Module):
    """Attention whose values come from outside, or whose result goes there."""

    def __init__(self, map_behind: bool) -> None:
        super().__init__()
        self.fc, self.map_behind = nn.Linear(8, 8), map_behind

    def forward(self, x: Tensor) -> Tensor:
        values = x if self.map_behind else self.fc(x)
        mixed = (x @ x.transpose(-2, -1)).softmax(-1) @ values
        return self.fc(mixed) if self.map_behind else mixed


class HandsOn(nn.Module):
    """In eval mode it hands something else on than in training."""

    def __init__(self, inner: Inner | Mixing, differs: bool) -> None:
        super().__init__()
        self.inner, self.differs, self.other = inner, differs, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        another = self.differs and not self.training
        if self.inner.map_behind:
            return self.inner(self.other(x) if another else x)  # type: ignore[no-any-return]
        out: Tensor = self.inner(x)
        return out.square() if another else out


class Outer(nn.Module):
    def __init__(self, inner: Inner | Mixing, differs: bool) -> None:
        super().__init__()
        self.fc, self.between = nn.Linear(8, 8), HandsOn(inner, differs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.between(self.fc(x)) if self.between.inner.map_behind else self.fc(self.between(x))
        return out


@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize("map_behind", [True, False])
@pytest.mark.parametrize("kind", [Inner, Mixing])
def test_a_forward_between_that_hands_on_something_else_in_eval_mode_parts_w_or_a(
    kind: type[Inner] | type[Mixing], map_behind: bool, differs: bool
) -> None:
    plan = bypass_fx.plan(Outer(kind(map_behind), differs), mode="strict", example_inputs=(torch.ones(2, 5, 8),))
    assert len(plan.sites) == (not differs), plan


def test_a_batchnorm_that_counts_its_batches_in_training_and_has_its_activation_inside_is_one_of_w() -> None:
    """timm's BatchNormAct2d counts in training alone, which is beside the path."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), BatchNormAct2d(8), nn.Conv2d(8, 4, 3, padding=1))
    x = torch.randn(2, 3, 5, 5)
    model(x)  # so that its statistics are no longer the first ones
    before = model.eval()(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    assert (site.constraint, site.exact) == ("augmented", "eval")
    assert site.first is not None and (site.first.name, site.first.norm) == ("0", "1")
    assert torch.equal(model(x), before)
    expect_exact_fold(model, site, x)
