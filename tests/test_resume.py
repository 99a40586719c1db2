"""A bypass goes on exactly where it stopped, in every phase and with every return."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from bypass_fx.accept import NotWorse
from bypass_fx.arrival import Total
from bypass_fx.comeback import Homotopy, Penalty, Proximal
from bypass_fx.gamma import Adaptive, Linear
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule
from tests.bypasses import X, Y, adam, begin, mlp, train_step

pytestmark = pytest.mark.usefixtures("small_heap")

Arguments = dict[str, Any]


def watched(after: int, tolerance: float) -> NotWorse:
    return NotWorse(lambda model: nn.functional.mse_loss(model(X), Y), after, tolerance)


BYPASSES: dict[str, Callable[[], Arguments]] = {
    "homotopy": lambda: {"comeback": "homotopy", "lr": 5e-3},
    "homotopy at once": lambda: {"comeback": "homotopy", "opt1": 0, "opt2": 12},
    "published at once": lambda: {
        "comeback": Penalty(hand_over=False), "gamma": Linear(0.05), "epsilon": 0.01, "opt1": 0, "opt2": 12,
    },
    "linear homotopy": lambda: {"comeback": Homotopy("linear")},
    "proximal": lambda: {"comeback": "proximal", "gamma": Linear(2.0), "epsilon": 1e-2},
    "penalty": lambda: {"comeback": "penalty", "gamma": Linear(0.05), "epsilon": 0.4},
    "penalty that hands over": lambda: {"comeback": "penalty", "gamma": Linear(1e-3)},
    "lagrangian": lambda: {"comeback": "lagrangian", "epsilon": {"1": 0.1, "*": 1e-6}},
    "variety": lambda: {"comeback": "variety"},
    "adaptive": lambda: {"comeback": Proximal(landing=0), "gamma": Adaptive(0.5, window=2)},
    "all together": lambda: {"comeback": "homotopy", "epsilon": Total(0.2)},
    "two cycles": lambda: {"opt1": 2, "opt2": 3, "cycles": 2, "rest": 2},
    "accepted": lambda: {"accept": watched(2, tolerance=1e9)},
    "rolled back": lambda: {"accept": watched(2, tolerance=-1e9)},
}  # fmt: skip


class Run:
    """All that a training script keeps, built anew after each crash."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.model = mlp()
        self.optimizer = adam(self.model)
        self.driver = lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        self.schedule = BypassSchedule(self.model, self.optimizer, **{"opt1": 4, "opt2": 8, **arguments})
        self.losses: list[float] = []

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.losses.append(train_step(self.model, self.optimizer, self.schedule).item())
            self.driver.step()

    def save(self) -> bytes:
        parts = (self.schedule, self.model, self.optimizer, self.driver)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for part, state in zip((self.schedule, self.model, self.optimizer, self.driver), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:penalty")
@pytest.mark.parametrize("make", BYPASSES.values(), ids=BYPASSES)
@pytest.mark.parametrize("killed", range(18))  # after every step of every phase
def test_a_run_killed_in_any_phase_goes_on_bit_for_bit(killed: int, make: Callable[[], Arguments]) -> None:
    whole, before, after = Run(make()), Run(make()), Run(make())
    whole.go(18)
    assert whole.schedule.phase == "done"
    before.go(killed)
    after.load(before.save())
    assert after.schedule.phase == before.schedule.phase
    after.go(18 - killed)
    assert before.losses + after.losses == whole.losses
    assert after.schedule.reports == whole.schedule.reports
    ends = [run.model.state_dict() for run in (whole, after)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    moments = [list(run.optimizer.state.values()) for run in (whole, after)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*moments, strict=True) for key in a)
    assert whole.optimizer.param_groups[0]["lr"] == after.optimizer.param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:penalty")
def test_the_runs_above_pass_through_every_phase_and_a_single_arrival() -> None:
    seen: set[Any] = set()
    for make in BYPASSES.values():
        run = Run(make())
        for _ in range(18):
            run.go(1)
            seen |= {run.schedule.phase, len(run.schedule.out)}
        seen |= {bool(report.rolled_back) for report in run.schedule.reports}
    assert seen >= {"opt1", "opt2", "train3", "done", 1, 2, False}


def test_lambda_prime_goes_on_where_the_rate_had_fallen_before_theta_star() -> None:
    """As under ReduceLROnPlateau, or by hand: a new optimiser has its first rate again until its state is loaded."""

    def begun(rate: float) -> tuple[nn.Module, torch.optim.Optimizer, BypassSchedule]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        optimizer.param_groups[0]["lr"] = rate
        return model, optimizer, BypassSchedule(model, optimizer, 1, 8, lr=5e-3)

    one, other = begun(1e-3), begun(1e-2)
    for _ in range(3):
        train_step(*one)
    for part, saved in zip(reversed(other), reversed(one), strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    while one[2].phase != "done":
        train_step(*one)
        train_step(*other)
    assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))


def test_norms_of_a_double_model_go_on_with_all_their_digits() -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer, BypassSchedule]:
        model = mlp().double()
        optimizer = adam(model)
        proximal = Proximal(landing=0)
        schedule = BypassSchedule(model, optimizer, 2, 9, comeback=proximal, gamma=Linear(0.01), penalty_every=4)
        return model, optimizer, schedule

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: BypassSchedule) -> None:
        (nn.functional.mse_loss(model(X.double()), Y.double()) + schedule.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    one, other = begun(), begun()
    for _ in range(4):
        step(*one)
    for part, saved in zip(reversed(other), reversed(one), strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    for pair in (one, other):
        step(*pair)
    assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))


def test_a_state_that_does_not_fit_is_refused() -> None:
    _, _, schedule = begin()
    state = schedule.state_dict()
    with pytest.raises(BypassError, match="a comeback 'homotopy', not 'penalty'; build the schedule with"):
        begin(comeback="penalty", gamma=Linear(1.0))[2].load_state_dict(state)
    with pytest.raises(BypassError, match=r"differ in the sites \['1'\]; build the schedule with plan="):
        begin(select="3")[2].load_state_dict(state)
    with pytest.raises(BypassError, match="no state of this version's BypassSchedule"):
        begin()[2].load_state_dict({})
    model, optimizer, begun = begin()
    train_step(model, optimizer, begun)
    with pytest.raises(BypassError, match="load the state into a new one"):
        begun.load_state_dict(state)


def test_a_saved_state_does_not_change_as_training_goes_on() -> None:
    model, optimizer, schedule = begin(comeback="penalty", gamma=Linear(1.0), epsilon=0.5)
    train_step(model, optimizer, schedule)
    state = schedule.state_dict()
    kept = copy.deepcopy(state)
    for _ in range(4):
        train_step(model, optimizer, schedule)
    tensors = [state.pop("snapshot")["tensors"], kept.pop("snapshot")["tensors"]]
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    assert state == kept


def test_a_disk_snapshot_is_found_again(tmp_path: Path) -> None:
    arguments = {"accept": watched(2, tolerance=-1e9), "snapshot": tmp_path}
    before, after = Run(arguments), Run(arguments)
    start = {key: value.clone() for key, value in mlp().state_dict().items()}
    before.go(7)
    saved = before.save()
    assert len(saved) < 2 * 10_000  # θ* is not in it
    after.load(saved)
    after.go(7)
    assert after.schedule.report is not None and after.schedule.report.rolled_back
    assert all(torch.equal(value, start[key]) for key, value in after.model.state_dict().items())
