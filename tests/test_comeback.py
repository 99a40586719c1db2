"""Promises of the ways back: what each adds to the loss, how it shrinks D, and that those that promise to end do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bypass_fx
from bypass_fx import comeback, constraint, surgery
from bypass_fx.comeback import (
    COMEBACKS,
    PATHS,
    AugmentedLagrangian,
    Comeback,
    Homotopy,
    Moment,
    Penalty,
    Proximal,
    resolve,
)
from bypass_fx.gamma import Linear
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule, ScheduleReport

norms = st.lists(st.floats(0, 1e3), min_size=1, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def moment(norms: Tensor, t: int = 0, budget: int = 10, gamma: float = 0.0, lr: float = 0.1) -> Moment:
    return Moment(norms, torch.tensor(gamma, dtype=norms.dtype), t, budget, lr)


@given(norms, st.floats(0, 1e3), st.floats(1e-6, 1.0))
def test_proximal_lowers_every_norm_by_lr_times_gamma_and_stops_at_zero(norms: Tensor, gamma: float, lr: float) -> None:
    factors = Proximal(landing=0).shrink(moment(norms, gamma=gamma, lr=lr))
    assert torch.allclose(factors * norms, (norms - lr * gamma).clamp(min=0), atol=1e-9)
    assert factors.min() >= 0
    assert factors.max() <= 1


def test_proximal_is_defined_where_norm_and_gamma_are_zero() -> None:
    assert Proximal().shrink(moment(torch.zeros(2))).isfinite().all()


@given(st.sampled_from(sorted(PATHS)), st.integers(1, 60), st.integers(1, 60))
def test_homotopy_follows_its_path_and_ends_at_exactly_zero_on_time(path: str, budget: int, t: int) -> None:
    come, left = Homotopy(path), torch.ones(1, dtype=torch.float64)
    for step in range(budget):
        left = left * come.shrink(moment(left, step, budget))
        if step + 1 == t < budget:
            assert left.item() == pytest.approx(PATHS[path](1 - t / budget))
    assert left.item() == 0.0


def test_a_homotopy_of_many_steps_does_not_end_early_by_rounding() -> None:
    for path in PATHS:
        factors = [Homotopy(path).shrink(moment(torch.ones(1), t, 10**9)).item() for t in (10**9 - 3, 10**9 - 2)]
        assert 0 < min(factors) < max(factors) < 1


def test_the_paths_fall_from_one_to_zero_as_less_of_the_way_is_left() -> None:
    for path in PATHS.values():
        values = [path(i / 100) for i in range(101)]
        assert values[0] == 0
        assert values[-1] == pytest.approx(1)
        assert all(b > a for a, b in pairwise(values))


def test_proximal_lands_on_time_whatever_gamma_and_goes_on_beyond_the_budget_where_asked() -> None:
    come, left = Proximal(landing=0.25), torch.ones(1, dtype=torch.float64)
    for t in range(20):
        assert come.pace(t, 20) == pytest.approx(left.item())
        left = left * come.shrink(moment(left, t, 20))
        assert (left.item() < 1) == (t >= 15)
    assert left.item() == 0
    assert come.shrink(moment(torch.ones(1), 20, 20)).item() == come.pace(20, 20) == 1


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_landing_that_is_no_part_of_the_budget_is_refused(share: float) -> None:
    for kind in (Proximal, AugmentedLagrangian):
        with pytest.raises(BypassError, match="give a number from 0 to 1"):
            kind(landing=share)


def test_homotopy_slows_d_down_as_it_shrinks_it() -> None:
    assert [Homotopy("linear").pace(t, 4) for t in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [come().pace(3, 4) for come in (Penalty, Proximal)] == [1.0, 1.0]


def test_penalty_adds_gamma_times_the_norms_of_the_sites_still_out() -> None:
    model = bypass_fx.extend(mlp())
    first, second = surgery.sites(model)
    with torch.no_grad():
        surgery.delta_of(model, first).fill_(0.1)
        surgery.delta_of(model, second).fill_(-0.2)
    gamma, values = torch.tensor(3.0), bypass_fx.norms(model)
    both = Penalty().penalty(model, frozenset(values), gamma)
    assert torch.allclose(both, 3 * sum(values.values(), torch.zeros(())))
    one = Penalty().penalty(model, frozenset({first.name}), gamma)
    assert torch.allclose(one, 3 * values[first.name])
    one.backward()
    assert surgery.delta_of(model, first).grad is not None
    assert surgery.delta_of(model, second).grad is None


@pytest.mark.parametrize("name", ["proximal", "homotopy", "variety"])
def test_the_guaranteed_returns_leave_the_loss_alone(name: str) -> None:
    assert resolve(name).penalty(mlp(), frozenset(), torch.ones(())) is None


@pytest.mark.parametrize("come", COMEBACKS.values(), ids=COMEBACKS)
def test_each_return_says_where_it_ends(come: Callable[[], Comeback]) -> None:
    text = str(type(come()).__doc__)
    assert "D = 0" in text and "Ends at" in text


def test_an_unknown_return_or_path_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        BypassError, match=r"did you mean homotopy\? \(penalty, proximal, homotopy, lagrangian, variety, published\)"
    ):
        resolve("homotpy")
    with pytest.raises(BypassError, match=r"give one of the known names \(smooth, cosine, linear\)"):
        Homotopy("spiral")
    with pytest.raises(BypassError, match="unknown comeback None"):
        resolve(None)  # type: ignore[arg-type]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up, self.down, self.head = (nn.Linear(*s) for s in ((64, 8), (8, 16), (16, 8), (8, 10)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return out


def train(
    model: nn.Module, opt1: int = 100, opt2: int = 200, **arguments: Any
) -> tuple[BypassSchedule, list[tuple[float, float]], dict[str, nn.Parameter]]:
    """One bypass on the digits with Adam at 4e-3; the schedule, the loss before and after each step of it, the D's."""
    x, y = (torch.as_tensor(part)[:512] for part in load_digits(return_X_y=True))
    x, losses = x.float() / 8 - 1, []
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = BypassSchedule(model, optimizer, opt1, opt2, **arguments)
    deltas = {site.name: surgery.delta_of(model, site) for site in surgery.sites(model)}

    def evaluate() -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x), y).item()

    while schedule.phase != "done":
        loss = nn.functional.cross_entropy(model(x), y) + schedule.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = evaluate()
        away = [delta.detach().norm().item() for delta in deltas.values()]
        schedule.step()
        if schedule.steps == opt1:
            assert min(away) > 0.1  # the walk did lead away
        losses.append((before, evaluate()))
    return schedule, losses, deltas


def done(schedule: BypassSchedule) -> ScheduleReport:
    assert schedule.report is not None
    return schedule.report


@pytest.mark.parametrize("model", [mlp, Residual])
def test_on_digits_homotopy_brings_d_to_exactly_zero_on_time_and_without_a_jump(model: Any) -> None:
    mode = "relaxed" if model is Residual else "strict"
    schedule, losses, deltas = train(model(), comeback="homotopy", mode=mode, epsilon=1e-6)
    report = done(schedule)
    assert report.left_out == ()
    assert {arrival.site for arrival in report.arrivals} == set(deltas)
    assert report.opt2_steps <= 200
    assert all((delta == 0).all() for delta in deltas.values())
    before, after = losses[-1]
    assert after == pytest.approx(before, rel=1e-4)  # by 1e-2 where D keeps its learning rate to the end
    assert after < losses[0][0]


@pytest.mark.parametrize("model", [mlp, Residual])
def test_on_digits_proximal_brings_d_to_exactly_zero_within_its_budget(model: Any) -> None:
    mode = "relaxed" if model is Residual else "strict"
    schedule, losses, deltas = train(model(), comeback="proximal", gamma=Linear(0.5), mode=mode)
    report = done(schedule)
    assert report.left_out == ()
    assert len(report.arrivals) == len(deltas)
    assert report.opt2_steps < 200
    assert all((delta == 0).all() for delta in deltas.values())
    assert losses[-1][1] < losses[0][0]


def test_on_digits_the_papers_penalty_comes_near_idles_above_epsilon_and_says_so_once() -> None:
    published = Penalty(hand_over=False)
    with pytest.warns(UserWarning, match="idles|still out") as warned:
        schedule, _, _ = train(mlp(), opt2=300, comeback=published, gamma=Linear(0.1), epsilon=5e-6)
    idles, ended = (str(warning.message) for warning in warned)
    assert re.fullmatch(r"penalty: after \d+ steps of opt2 the norm idles at [\d.]+ while γ grows", idles)
    assert "2 of 2 sites still out" in ended
    report = done(schedule)
    assert report.notes == (idles,)
    assert [arrival.site for arrival in report.left_out] == ["1", "3"]
    assert all(5e-6 < arrival.norm < 0.5 for arrival in report.left_out)


def test_a_penalty_that_idles_hands_over_to_proximal_and_arrives_at_d_zero() -> None:
    with pytest.warns(UserWarning, match=r"idles at .*; it handed over to the proximal return") as warned:
        schedule, _, deltas = train(mlp(), opt2=300, comeback="penalty", gamma=Linear(0.1), epsilon=5e-6)
    assert [warning.filename for warning in warned] == [__file__]  # the line that calls step
    assert done(schedule).left_out == ()
    assert done(schedule).notes == (str(warned[0].message),)
    assert done(schedule).opt2_steps < 300
    assert all((delta == 0).all() for delta in deltas.values())


def test_a_penalty_too_weak_to_come_near_hands_over_for_the_last_quarter() -> None:
    with pytest.warns(UserWarning, match=r"after 150 steps of opt2 the norm is .* with a quarter of the budget left"):
        schedule, losses, _ = train(mlp(), comeback="penalty", gamma=Linear(1e-6), epsilon=1e-9)
    assert done(schedule).left_out == ()
    assert done(schedule).opt2_steps == 200
    assert losses[-1][1] == pytest.approx(losses[-1][0], rel=1e-3)


def test_a_penalty_that_falls_is_left_alone() -> None:
    come, model = Penalty(), mlp()
    come.begin(model)
    for t in range(60):
        norm = 8.0 if t < 20 else 8.0 * 0.9 ** (t - 20)
        come.observe(model, Moment(torch.ones(1), torch.ones(()), t, 200, 0.1, {"a": norm}))
    assert come.notes() == ()
    assert come.shrink(moment(torch.ones(1))) is None


@pytest.mark.filterwarnings("ignore:penalty")
def test_a_penalty_remembers_what_it_has_seen() -> None:
    model, whole, notes = mlp(), Penalty(window=5), []
    whole.begin(model)
    pieces = Penalty(window=5)
    for t in range(40):
        state = pieces.state_dict()
        pieces = Penalty(window=5)
        pieces.begin(model)
        pieces.load_state_dict(state)
        now = Moment(torch.ones(1), torch.ones(()), t, 200, 0.1, {"a": max(1.0, 8.0 * 0.8**t)})
        for come in (whole, pieces):
            come.observe(model, now)
        assert pieces.state_dict() == whole.state_dict()
        notes.append(len(whole.notes()))
    assert notes == [0] * 19 + [1] * 21  # the mean of steps 15 to 19 is that of 10 to 14


class Multipliers(Comeback):
    """A return that remembers: an augmented Lagrangian in the norms. Ends at ADW = 0 where it ends, D = 0 or not."""

    name = "multipliers"
    uses_gamma = True

    def __init__(self) -> None:
        self.weights = torch.zeros(0)

    def penalty(self, model: nn.Module, out: frozenset[str], gamma: Tensor) -> Tensor:
        values = torch.stack([constraint.residual(model, site) for site in surgery.sites(model)])
        weights = self.weights if len(self.weights) else torch.zeros_like(values)
        return (weights.detach() * values + gamma / 2 * values**2).sum()

    def shrink(self, now: Moment) -> None:
        self.weights = now.gamma * now.norms + (self.weights if len(self.weights) else 0)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = state["weights"].clone()


def test_a_return_of_ones_own_is_one_class_and_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comeback.COMEBACKS, "multipliers", Multipliers)
    schedule, losses, _ = train(mlp(), comeback="multipliers", gamma=Linear(0.5), epsilon=0.05, at_budget="continue")
    assert done(schedule).comeback == "multipliers"
    assert max(arrival.norm for arrival in done(schedule).arrivals) < 0.05
    assert math.isfinite(losses[-1][1])
    assert schedule.state_dict()["bypass"]["comeback"]["weights"].max() > 0
