"""Promises of the probe: it tells what the sites promise, and leaves nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import bypass_fx
from bypass_fx import surgery
from bypass_fx.passes.errors import BypassError, PlanError
from bypass_fx.probe import ProbeReport, probe
from bypass_fx.schedule import BypassSchedule
from tests.bypasses import X, Y, mlp
from tests.test_param_group import same

pytestmark = pytest.mark.usefixtures("small_heap")
BATCHES = [(X[:16], Y[:16]), (X[16:], Y[16:])]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def noisy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    )


def trained(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    driver = lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for _ in range(3):
        loss_fn(model, BATCHES[0]).backward()
        optimizer.step()
        driver.step()
    return optimizer, driver


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, driver: Any) -> Any:
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, driver)]
    return states, gradients, torch.get_rng_state(), type(model), [p for p, _ in model.named_parameters()]


def test_nothing_of_a_probe_is_left() -> None:
    model = noisy()
    optimizer, driver = trained(model)
    before = everything(model, optimizer, driver)
    gradients = [p.grad for p in model.parameters()]
    report = probe(model, loss_fn, BATCHES, optimizer=optimizer, steps=4, mode="all")
    assert same(everything(model, optimizer, driver), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert report.plain != report.loss


def test_nothing_of_a_probe_that_fails_is_left() -> None:
    model = noisy()
    optimizer, driver = trained(model)
    before = everything(model, optimizer, driver)
    calls = []

    def fails(model: nn.Module, batch: Any) -> Tensor:
        calls.append(surgery.is_extended(model))
        if len(calls) == 17:
            raise KeyError("broken")
        return loss_fn(model, batch)

    with pytest.raises(KeyError):
        probe(model, fails, BATCHES, optimizer=optimizer, steps=4, mode="all")
    assert calls[-1]
    assert same(everything(model, optimizer, driver), before)


def test_gradients_are_those_at_theta_star() -> None:
    model = mlp()
    report = probe(model, loss_fn, BATCHES)
    plain = torch.autograd.grad(loss_fn(model, (X, Y)), [*model.parameters()])
    assert report.gradient == pytest.approx(float(torch.cat([g.flatten() for g in plain]).norm()), rel=1e-5)
    bypass_fx.extend(model)
    for site, found in zip(surgery.sites(model), report.sites, strict=True):
        (gradient,) = torch.autograd.grad(loss_fn(model, (X, Y)), [surgery.delta_of(model, site)])
        assert found.name == site.name
        assert found.gradient == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert found.ratio == pytest.approx(found.gradient / report.gradient)


def by_hand(select: str | None, steps: int) -> float:
    model = mlp()
    if select:
        bypass_fx.extend(model, select=select)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model, BATCHES[step % 2]).backward()
        optimizer.step()
    return sum(float(loss_fn(model, batch).detach()) for batch in BATCHES) / 2


def test_the_gain_is_what_the_steps_gain_by_hand() -> None:
    model = mlp()
    report = probe(model, loss_fn, BATCHES, optimizer=torch.optim.SGD(model.parameters(), 0.05), steps=5)
    assert report.steps == 5
    assert report.plain == pytest.approx(by_hand(None, 5), rel=1e-6)
    expected = {"all": "*", "1": "1", "3": "3"}
    assert {candidate.name for candidate in report.candidates} == expected.keys()
    for candidate in report.candidates:
        assert candidate.loss == pytest.approx(by_hand(expected[candidate.name], 5), rel=1e-6)
        assert candidate.gain == pytest.approx((report.plain - candidate.loss) / 5)
    assert [c.gain for c in report.candidates] == sorted((c.gain for c in report.candidates), reverse=True)
    assert tuple(site.name for site in report.best) == report.candidates[0].sites


def test_candidates_of_ones_own() -> None:
    report = probe(mlp(), loss_fn, BATCHES, candidates={"early": "1", "both": ["1", "3"]})
    assert {candidate.name: candidate.sites for candidate in report.candidates} == {"early": ("1",), "both": ("1", "3")}
    with pytest.raises(BypassError, match="the candidate 'late' names no site"):
        probe(mlp(), loss_fn, BATCHES, candidates={"late": "9"})


def test_select_probe_takes_the_best_candidates_sites() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    best = probe(model, loss_fn, BATCHES, optimizer=optimizer, steps=3).best
    plan = bypass_fx.plan(model, select="probe", loss_fn=loss_fn, batches=BATCHES, optimizer=optimizer, steps=3)
    assert plan.sites == best.sites
    schedule = BypassSchedule(model, optimizer, 2, 3, select="probe", loss_fn=loss_fn, batches=BATCHES, steps=3)
    assert schedule.out == {site.name for site in best}
    other = bypass_fx.extend(mlp(), select="probe", loss_fn=loss_fn, batches=BATCHES)
    assert surgery.is_extended(other)


def test_select_probe_refuses_where_nothing_is_gained() -> None:
    def indifferent(model: nn.Module, batch: Any) -> Tensor:
        return 0 * loss_fn(model, batch)

    model = mlp()
    with pytest.raises(PlanError, match="no sites with which 2 steps gain more than plain training"):
        bypass_fx.extend(model, select="probe", loss_fn=indifferent, batches=BATCHES)
    assert not surgery.is_extended(model)


def test_what_is_missing_or_too_much_is_named() -> None:
    with pytest.raises(PlanError, match=r"pass loss_fn=.*and batches="):
        bypass_fx.plan(mlp(), select="probe", loss_fn=loss_fn)
    with pytest.raises(PlanError, match=r"batches: for select='stuck' or 'probe' only"):
        bypass_fx.plan(mlp(), batches=BATCHES)
    with pytest.raises(BypassError, match="at least one batch"):
        probe(mlp(), loss_fn, [])
    for steps in (0, 2.0, "3"):
        with pytest.raises(BypassError, match=f"steps is {steps!r}; give a number of steps, 1 or more"):
            probe(mlp(), loss_fn, BATCHES, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(BypassError, match=r"candidates is .*; give a dict of a name"):
        probe(mlp(), loss_fn, BATCHES, candidates=["1"])  # type: ignore[arg-type]
    with pytest.raises(BypassError, match=r"loss_fn is None; give a function \(model, batch\) → loss"):
        probe(mlp(), None, BATCHES)  # type: ignore[arg-type]
    with pytest.raises(BypassError, match="batches is 3; give a list of batches"):
        probe(mlp(), loss_fn, 3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="nothing to bypass"):
        probe(nn.Sequential(nn.Linear(6, 2)), loss_fn, BATCHES)


def test_a_loss_that_is_no_number_is_the_worst_candidate() -> None:
    def breaks(model: nn.Module, batch: Any) -> Tensor:
        names = {site.name for site in surgery.sites(model)} if surgery.is_extended(model) else set()
        return loss_fn(model, batch) * (float("nan") if names == {"1"} else 1.0)

    report: ProbeReport = probe(mlp(), breaks, BATCHES)
    assert report.candidates[-1].name == "1"


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(batch[0]), "one number, a 0-dim tensor"),
        (lambda model, batch: 1.0, "one number, a 0-dim tensor"),
        (lambda model, batch: model(batch[0]).sum().detach(), "the loss has no gradient"),
    ],
)
def test_a_loss_that_is_none_is_refused_and_changes_nothing(loss_fn: Any, message: str) -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BypassError, match=message):
        probe(model, loss_fn, [(X, Y)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
