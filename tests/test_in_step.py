"""Bypasses in step are led as rows of one matrix, and end where each alone does."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import bypass_fx
from bypass_fx import in_step, readout
from bypass_fx.bypass import Bypass
from bypass_fx.bypass_report import NonFiniteError
from bypass_fx.comeback import Homotopy, Moment, Penalty
from bypass_fx.lookout import Seen
from bypass_fx.schedule import BypassSchedule
from bypass_fx.stack import Stack
from tests.alongside import Alone, adam, batches_at, expect_same, lead, loss_fn, seeds, sgd, together

plain_lead = in_step.lead


@pytest.fixture
def led(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The models of which D was scaled together, in each step."""
    found = list[tuple[int, ...]]()

    def lead(
        bypasses: Mapping[int, Bypass], seen: Mapping[int, Seen], deltas: Stack, rows: Sequence[int]
    ) -> dict[int, Seen]:
        told = plain_lead(bypasses, seen, deltas, rows)
        found.append(tuple(row for row, each in told.items() if each.shrunk is not None))
        return told

    monkeypatch.setattr(in_step, "lead", lead)
    return found


@pytest.fixture(params=["at once", "late"])
def readings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings as on a CPU, and a step later as from a GPU."""
    if request.param == "late":
        monkeypatch.setattr(readout, "delays", lambda device: True)


@pytest.mark.parametrize("epsilon", [1e-9, {"1": 1e-9, "3": 0.02}, bypass_fx.Total(0.02)])
@pytest.mark.parametrize("comeback", ["homotopy", "proximal"])
def test_all_in_step(comeback: str, epsilon: Any, led: list[tuple[int, ...]], readings: None) -> None:
    models = seeds()
    replicas, alone = together(models, adam), Alone(models, adam)

    def begin(row: int, model: nn.Module, optimizer: Optimizer) -> BypassSchedule:
        return BypassSchedule(
            model, optimizer, opt1=9, opt2=20, gamma=bypass_fx.Linear(0.1), epsilon=epsilon, comeback=comeback,
            mode="all", penalty_every=3,
        )  # fmt: skip

    lead(replicas, alone, begin)
    expect_same(replicas, alone, range(30))
    assert sum(len(each) == 4 for each in led) >= 3
    for own, other in zip(replicas.schedules, alone.schedules, strict=True):
        assert own and other and own.report and other.report
        assert [(each.site, each.step) for each in own.report.arrivals] == [
            (each.site, each.step) for each in other.report.arrivals
        ]


def test_only_those_that_do_the_same(led: list[tuple[int, ...]]) -> None:
    models = seeds()
    replicas, alone = together(models, sgd), Alone(models, sgd)

    class Own(Homotopy):
        """One that scales in its own way."""

        def scale(self, model: nn.Module, site: bypass_fx.Site, factor: Tensor) -> None:
            super().scale(model, site, factor**2)

    ways = [("homotopy", 8), (Own(), 8), ("homotopy", 8), ("homotopy", 9)]

    def begin(row: int, model: nn.Module, optimizer: Optimizer) -> BypassSchedule:
        comeback, opt2 = ways[row]
        return BypassSchedule(model, optimizer, opt1=2, opt2=opt2, comeback=comeback, mode="all")

    lead(replicas, alone, begin)
    expect_same(replicas, alone, range(12))
    assert {*led} == {(), (0, 2)}


def test_returns_of_a_class_of_the_users_may_differ_in_what_they_hold(led: list[tuple[int, ...]]) -> None:
    models = seeds()
    replicas, alone = together(models, sgd), Alone(models, sgd)

    class Faster(Homotopy):
        """One that has a number of its own."""

        def __init__(self, power: float) -> None:
            super().__init__()
            self.power = power

        def shrink(self, now: Moment) -> Tensor | None:
            factors = super().shrink(now)
            return None if factors is None else factors**self.power

    class Weighted(Penalty):
        """The same of a penalty."""

        def __init__(self, weight: float) -> None:
            super().__init__(hand_over=False)
            self.weight = weight

        def penalty(self, model: nn.Module, out: frozenset[str], gamma: Tensor) -> Tensor | None:
            term = super().penalty(model, out, gamma)
            return None if term is None else self.weight * term

    ways = [Faster(1), Faster(2), Weighted(1), Weighted(10)]

    def begin(row: int, model: nn.Module, optimizer: Optimizer) -> BypassSchedule:
        return BypassSchedule(
            model, optimizer, opt1=2, opt2=8, comeback=copy.deepcopy(ways[row]), gamma=bypass_fx.Linear(0.1), mode="all",
            at_budget="continue",
        )  # fmt: skip

    lead(replicas, alone, begin)
    expect_same(replicas, alone, range(9))
    assert {*led} == {()}


def test_what_is_not_finite_is_found_late_and_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "delays", lambda device: True)
    models = seeds()
    replicas = together(models, sgd)
    replicas.lead(lambda model, optimizer: BypassSchedule(model, optimizer, opt1=20, opt2=20, mode="all"))
    losses = replicas.backward(loss_fn, batches_at(0))
    losses[2] = torch.nan
    replicas.step(losses)
    assert not replicas.failures  # nobody waited for it
    for step in range(1, 17):
        replicas.step(replicas.backward(loss_fn, batches_at(step)))
        if replicas.failures:
            break
    assert [*replicas.failures] == [2] and isinstance(replicas.failures[2], NonFiniteError)
    assert "opt1, step 8: the loss is nan" in str(replicas.failures[2])
    torch.testing.assert_close([*replicas.models[2].parameters()], [*models[2].parameters()])
