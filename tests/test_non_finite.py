"""Numbers that are not finite stop a bypass with the phase, the step and the place, and θ* is back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bypass_fx import surgery
from bypass_fx.accept import Accept
from bypass_fx.bypass import LOOKS_EVERY
from bypass_fx.schedule import BypassSchedule, NonFiniteError
from tests.bypasses import X, Y, begin, deltas, mlp, train_step, until_done

pytestmark = pytest.mark.usefixtures("small_heap")
BROKEN = pytest.mark.parametrize("value", [float("nan"), float("inf")])


def at_the_start(model: nn.Module) -> bool:
    start = mlp().state_dict()
    return model.state_dict().keys() == start.keys() and all(
        torch.equal(value, start[key]) for key, value in model.state_dict().items()
    )


def steps_until_seen(schedule: BypassSchedule) -> None:
    """All that moves is looked at in every few steps, and in the last of each phase."""
    for _ in range(LOOKS_EVERY):
        schedule.step()


@pytest.mark.parametrize(("steps", "where"), [(1, "opt1, step 3: D of site '3'"), (5, "opt2, step 8: D of site '3'")])
@BROKEN
def test_d(steps: int, where: str, value: float) -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=9)
    for _ in range(steps):
        train_step(model, optimizer, schedule)
    with torch.no_grad():
        deltas(model)[1][0] = value
    with pytest.raises(NonFiniteError, match=where):
        steps_until_seen(schedule)
    assert at_the_start(model)
    assert not surgery.is_extended(model)
    assert not optimizer.state
    assert len(optimizer.param_groups) == 1
    assert schedule.phase == "done"
    assert schedule.report is not None and where in schedule.report.rolled_back


@pytest.mark.parametrize(("steps", "where"), [(1, "opt1, step 2: the loss is"), (5, "opt2, step 3: the loss is")])
@BROKEN
def test_the_loss(steps: int, where: str, value: float) -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=9)
    for _ in range(steps):
        train_step(model, optimizer, schedule)
    with pytest.raises(NonFiniteError, match=f"{where} {value}"):
        schedule.step(torch.tensor(value))
    assert at_the_start(model)


def test_the_loss_in_train3() -> None:
    model, optimizer, schedule = begin(opt1=1, opt2=1, accept=Accept(after=5))
    for _ in range(3):
        train_step(model, optimizer, schedule)
    with pytest.raises(NonFiniteError, match="train3, step 2: the loss is nan"):
        schedule.step(float("nan"))
    assert at_the_start(model)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_was_infinite_at_theta_star_is_no_reason_to_stop(frozen: bool) -> None:
    model = mlp()
    model.mask = nn.Parameter(torch.tensor([0.0, -float("inf")]), requires_grad=not frozen)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    until_done(model, optimizer, BypassSchedule(model, optimizer, 3, 5))
    assert model.mask.tolist() == [0.0, -float("inf")]


@pytest.mark.parametrize(("steps", "where"), [(1, "opt1, step 3"), (5, "opt2, step 8")])
@BROKEN
def test_a_gradient_that_reaches_no_d(steps: int, where: str, value: float) -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=9)
    for _ in range(steps):
        train_step(model, optimizer, schedule)
    nn.functional.mse_loss(model(X), Y).backward()
    model.get_parameter("4.bias").grad[0] = value  # type: ignore[index]
    optimizer.step()
    with pytest.raises(
        NonFiniteError, match=rf"{where}: 4\.bias is not finite, and so was its gradient; the model is at"
    ):
        steps_until_seen(schedule)
    assert at_the_start(model)


def test_large_numbers_whose_norm_overflows_are_let_pass() -> None:
    model, _, schedule = begin(opt1=3, opt2=9)
    with torch.no_grad():
        model.get_parameter("4.weight").fill_(3e38)
    for _ in range(3):
        schedule.step()
    assert schedule.phase == "opt2"


def test_without_a_snapshot_the_message_points_to_a_checkpoint() -> None:
    model, _, schedule = begin(snapshot=None)
    with pytest.raises(NonFiniteError, match="the loss is inf; go back to a checkpoint"):
        schedule.step(float("inf"))
    assert surgery.is_extended(model)
