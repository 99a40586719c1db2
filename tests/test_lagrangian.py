"""Promises of the augmented-Lagrangian return."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bypass_fx
from bypass_fx import constraint, surgery
from bypass_fx.comeback import AugmentedLagrangian, Moment, lagrangian
from bypass_fx.comeback.lagrangian import curvature
from bypass_fx.schedule import BypassSchedule
from tests.bypasses import X, Y
from tests.test_constraint import extended

OUT = frozenset({"1"})


def dense() -> nn.Module:
    torch.manual_seed(0)
    return extended(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))


def observe(come: AugmentedLagrangian, model: nn.Module, t: int, norm: float = 1.0) -> None:
    last = {"1": norm} if norm else {"elsewhere": 1.0}
    come.observe(model, Moment(torch.ones(1), torch.ones(()), t, 100, 0.1, last))


def test_the_penalty_is_that_of_the_matrix_and_smooth() -> None:
    model = dense()
    come = AugmentedLagrangian()
    come.begin(model)
    assert come.penalty(model, OUT, torch.zeros(())).item() == 0  # type: ignore[union-attr]
    with torch.no_grad():
        observe(come, model, t=0)
        observe(come, model, t=1)
        r = constraint.residual_entries(model, bypass_fx.sites(model)[0])
        weight = come.state_dict()["weights"][0]
        multiplier = come.state_dict()["multipliers"]["1"]
    assert torch.allclose(multiplier, r * weight / 2 / 10)  # μ was half as large after the first step, and 0 before it
    value = come.penalty(model, OUT, torch.zeros(()))
    assert torch.allclose(value, (multiplier * r).sum() + weight / 2 * r.square().sum())  # type: ignore[arg-type]
    value.backward()  # type: ignore[union-attr]
    a, d, w = model[2].weight, surgery.delta_of(model, bypass_fx.sites(model)[0]), model[0].weight  # type: ignore[index]
    pull = (multiplier + weight * r).view(3, 4)
    assert torch.allclose(d.grad, torch.einsum("mn,ml,nl->n", a, pull, w))  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False], ids=["augmented", "folded"])
def test_autocast_rounds_neither_the_penalty_nor_its_gradient(bias: bool) -> None:
    torch.manual_seed(0)
    model = extended(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=not bias))).float()
    come = AugmentedLagrangian()
    come.begin(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for t in range(2):
            come.norms(model)
            observe(come, model, t)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            term = come.penalty(model, OUT, torch.zeros(()))
        assert term is not None and term.dtype == torch.float32 and term != 0
        found.append((term, *torch.autograd.grad(term, list(model.parameters()), allow_unused=True)))
    for one, other in zip(*found, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_step_takes_the_residual_s_entries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = dense(), []
    once, again = AugmentedLagrangian(), AugmentedLagrangian()
    with torch.no_grad():
        for come in (once, again):
            come.begin(model)
            observe(come, model, t=0)  # μ is 0 before it
        (norm,) = once.norms(model)
        entries = constraint.residual_entries
        monkeypatch.setattr(lagrangian, "residual_entries", lambda *of: taken.append(of) or entries(*of))
        observe(once, model, t=1)
        assert not taken
        observe(again, model, t=1)
        assert len(taken) == 1
        assert torch.equal(once.state_dict()["multipliers"]["1"], again.state_dict()["multipliers"]["1"])
        observe(once, model, t=2)  # what was taken after the step before is not this one's
        assert len(taken) == 2
    assert torch.allclose(norm, constraint.residuals(model, bypass_fx.sites(model))[0])


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**16))
@settings(max_examples=40)
def test_the_curvature_bounds_the_squared_derivative(m: int, n: int, l: int, seed: int) -> None:  # noqa: E741
    torch.manual_seed(seed)
    model = extended(nn.Sequential(nn.Linear(l, n), nn.ReLU(), nn.Linear(n, m)), seed)
    (site,) = bypass_fx.sites(model)
    a, d, w = model[2].weight.detach(), surgery.delta_of(model, site).detach(), model[0].weight.detach()  # type: ignore[index]
    by_a, by_d, by_w = torch.autograd.functional.jacobian(lambda a, d, w: (a * d) @ w, (a, d, w))
    whole = torch.cat([by.reshape(m * l, -1) for by in (by_a, by_d, by_w)], 1)
    assert torch.linalg.matrix_norm(whole, 2).square() <= curvature(model, site) * (1 + 1e-9)


def test_a_step_of_gradient_descent_on_the_penalty_alone_never_raises_it() -> None:
    model = dense()
    come = AugmentedLagrangian(landing=0)
    come.begin(model)
    parameters = [model[0].weight, model[2].weight, *(surgery.delta_of(model, s) for s in bypass_fx.sites(model))]  # type: ignore[index]
    norms = []
    for t in range(200):
        with torch.no_grad():
            observe(come, model, t)
            come._multipliers["1"].zero_()
        norms.append(bypass_fx.norms(model)["1"].item())
        gradients = torch.autograd.grad(come.penalty(model, OUT, torch.zeros(())), parameters)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.1 * gradient)
    assert all(later <= earlier for earlier, later in pairwise(norms))
    assert norms[-1] < 1e-3 * norms[0]


def test_a_site_that_arrived_weighs_nothing_and_the_multipliers_rest_in_the_landing() -> None:
    model = dense()
    come = AugmentedLagrangian()
    come.begin(model)
    with torch.no_grad():
        for t in (0, 1, 2):
            observe(come, model, t)
        kept = come.state_dict()
        observe(come, model, 80)
        landed = come.state_dict()
        observe(come, model, 81, norm=0)
    assert kept["multipliers"]["1"].abs().max() > 0
    assert torch.equal(kept["multipliers"]["1"], landed["multipliers"]["1"])
    assert torch.equal(kept["weights"], landed["weights"])
    assert come.state_dict()["multipliers"]["1"].abs().max() == come.state_dict()["weights"].max() == 0


def test_the_landing_changes_nothing_where_adw_is_zero() -> None:
    model = dense()
    (site,) = bypass_fx.sites(model)
    delta = surgery.delta_of(model, site)
    with torch.no_grad():
        model[0].weight[2:] = 0  # type: ignore[index]
        delta[:2] = 0
        x = torch.randn(5, 4, dtype=torch.float64)
        before, bias = model(x), model[2].bias.clone()  # type: ignore[index]
        AugmentedLagrangian().scale(model, site, torch.tensor(0.25, dtype=torch.float64))
        assert torch.allclose(model(x), before, rtol=1e-12)
    assert not torch.equal(model[2].bias, bias)  # type: ignore[index]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.down(x + torch.relu(self.up(x)))
        return out


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), "strict"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)), "strict"),
        (Residual, "relaxed"),
    ],
    ids=["folded", "augmented", "relaxed"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("opt2", [1, 150])
def test_it_always_ends_on_time_and_without_a_jump(make: Any, mode: str, optimizer: str, opt2: int) -> None:
    torch.manual_seed(0)
    model = make()
    steps = (
        torch.optim.SGD(model.parameters(), 0.05) if optimizer == "sgd" else torch.optim.Adam(model.parameters(), 4e-3)
    )
    schedule = BypassSchedule(model, steps, 100, opt2, comeback="lagrangian", epsilon=1e-12, mode=mode)

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(X), Y)

    before, jump = 0.0, 0.0
    while schedule.phase != "done":
        steps.zero_grad()
        (loss() + schedule.penalty()).backward()
        steps.step()
        before = loss().item()
        schedule.step()
        jump = abs(loss().item() - before) / before
    assert schedule.report is not None and schedule.report.left_out == ()
    assert schedule.report.opt2_steps == opt2
    assert opt2 == 1 or jump < 2e-5  # the last of the landing's 38 steps; a millionth for longer ones
    assert all(parameter.isfinite().all() for parameter in model.parameters())
