"""Bypasses in a row, and a bypass from the initialisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bypass_fx
from bypass_fx import surgery
from bypass_fx.accept import Condition
from bypass_fx.schedule import BypassSchedule
from tests.bypasses import X, Y, begin, deltas, mlp, train_step, until_done

pytestmark = pytest.mark.usefixtures("small_heap")


def test_each_cycle_has_its_phases_with_a_rest_between_and_none_after_the_last() -> None:
    model, optimizer, schedule = begin(2, 3, cycles=3, rest=2)
    phases = [schedule.phase]
    while schedule.phase != "done":
        train_step(model, optimizer, schedule)
        phases.append(schedule.phase)
    cycle = ["opt1"] * 2 + ["opt2"] * 3
    assert phases == [*cycle, *["train3"] * 2, *cycle, *["train3"] * 2, *cycle, "done"]
    assert schedule.steps == 15
    assert [(report.opt1_steps, report.opt2_steps) for report in schedule.reports] == [(2, 3)] * 3
    assert not surgery.is_extended(model)
    assert len(optimizer.param_groups) == 1


def test_d_and_what_the_optimiser_remembers_of_it_are_fresh_in_each() -> None:
    model, optimizer, schedule = begin(2, 3, cycles=2)
    first = deltas(model)
    for _ in range(4):
        train_step(model, optimizer, schedule)
    assert all(optimizer.state[delta]["step"] == 4 for delta in first)
    train_step(model, optimizer, schedule)
    second = deltas(model)
    assert schedule.phase == "opt1"
    assert not {id(delta) for delta in first} & {id(delta) for delta in second}
    assert all((delta == 0).all() and delta not in optimizer.state for delta in second)
    assert all(delta not in optimizer.state for delta in first)
    train_step(model, optimizer, schedule)
    assert all(optimizer.state[delta]["step"] == 1 for delta in second)
    assert optimizer.state[model.get_parameter("0.weight")]["step"] == 6


def test_cycles_are_what_schedules_in_a_row_are() -> None:
    model, optimizer, schedule = begin(2, 3, cycles=2, lr=5e-3)
    until_done(model, optimizer, schedule)
    other, steps, one = begin(2, 3, lr=5e-3)
    done = 0
    for _ in range(2):
        while one.phase != "done":
            batch = torch.arange(done + one.steps, done + one.steps + 16) % 32
            steps.zero_grad()
            (nn.functional.mse_loss(other(X[batch]), Y[batch]) + one.penalty()).backward()
            steps.step()
            one.step()
        done += one.steps
        if done < 10:
            one = BypassSchedule(other, steps, 2, 3, lr=5e-3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_same_sites_are_taken_each_time() -> None:
    model, optimizer, schedule = begin(1, 1, cycles=2, select="3")
    train_step(model, optimizer, schedule)
    train_step(model, optimizer, schedule)
    assert schedule.out == {"3"}


def test_a_rollback_goes_to_the_theta_star_of_its_own_cycle_and_ends() -> None:
    kept: list[Any] = []

    def second_fails(model: nn.Module) -> bool:
        kept.append([parameter.detach().clone() for parameter in model.parameters()])
        return len(kept) == 1

    model, optimizer, schedule = begin(2, 2, cycles=3, accept=second_fails)
    until_done(model, optimizer, schedule)
    assert [report.rolled_back for report in schedule.reports] == ["", "accept said no"]
    assert all(map(torch.equal, model.parameters(), kept[0]))


def test_the_file_of_theta_star_goes_with_its_cycle(tmp_path: Path) -> None:
    model, optimizer, schedule = begin(1, 1, cycles=3, snapshot=tmp_path)
    while schedule.phase != "done":
        assert len(list(tmp_path.iterdir())) == 1
        train_step(model, optimizer, schedule)
    assert not list(tmp_path.iterdir())


def test_a_verdict_that_waits_longer_than_the_rest_is_waited_for() -> None:
    model, optimizer, schedule = begin(1, 1, cycles=2, rest=1, accept=Condition(lambda model: True, after=3))
    phases = []
    while schedule.phase != "done":
        train_step(model, optimizer, schedule)
        phases.append(schedule.phase)
    assert phases == ["opt2", "train3", "train3", "train3", "opt1", "opt2", "train3", "train3", "train3", "done"]


@pytest.mark.parametrize("comeback", ["homotopy", "lagrangian", "variety"])
def test_a_bypass_from_the_initialisation(comeback: str) -> None:
    """θ* = θ⁰ (Sec. VI-B): the first step ever is one of opt1."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    start = nn.functional.mse_loss(model(X), Y).item()
    schedule = bypass_fx.BypassSchedule(model, optimizer, 40, 60, comeback=comeback)
    assert not optimizer.state
    until_done(model, optimizer, schedule)
    assert nn.functional.mse_loss(model(X), Y).item() < start
    mlp().load_state_dict(model.state_dict())
