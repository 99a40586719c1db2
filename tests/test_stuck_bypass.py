"""Promises of a bypass of stuck channels: D moves in them only, in whatever loop, and they come to life."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bypass_fx
from bypass_fx import surgery
from bypass_fx.passes.errors import BypassError, PlanError
from bypass_fx.passes.plan import Plan
from bypass_fx.replicas import Replicas
from bypass_fx.schedule import BypassSchedule
from bypass_fx.stuck import stuck
from bypass_fx.trainer import Trainer
from tests.bypasses import train_step
from tests.dead_units import adam, batches_for, loss_fn, net
from tests.runs import digits, kill, mlp, short

pytestmark = pytest.mark.usefixtures("small_heap")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-4, momentum=0.9, nesterov=True),
    "fused": lambda parameters: torch.optim.Adam(parameters, 1e-2, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("comeback", ["lagrangian", "homotopy", "proximal", "variety"])
@pytest.mark.filterwarnings("ignore:penalty")
def test_d_moves_in_the_stuck_channels_only(make: Callable[[Any], torch.optim.Optimizer], comeback: str) -> None:
    model, batches = net(), batches_for(6)
    optimizer = make(model.parameters())
    arguments: dict[str, Any] = {"gamma": bypass_fx.Linear(0.1)} if comeback == "proximal" else {}
    schedule = BypassSchedule(
        model, optimizer, 4, 6, comeback=comeback, select="stuck", loss_fn=loss_fn, batches=batches, **arguments
    )
    moved = {site.name: set[int]() for site in schedule.plan}
    while schedule.phase != "done":
        train_step(model, optimizer, schedule)
        for site in surgery.sites(model) if schedule.phase != "done" else []:
            moved[site.name] |= set(surgery.delta_of(model, site).nonzero().flatten().tolist())
    assert moved == {"1": {2, 5}, "3": {0}}
    assert not surgery.is_extended(model)
    model[0].bias.grad = None
    train_step(model, optimizer, schedule)  # nothing of it is left in the optimiser
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_lbfgs_too() -> None:
    model, batches = net(), batches_for(6)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    schedule = BypassSchedule(model, optimizer, 3, 3, select="stuck", loss_fn=loss_fn, batches=batches)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batches[0]) + schedule.penalty()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
        found = [surgery.delta_of(model, site).nonzero().flatten().tolist() for site in surgery.sites(model)]
        assert found == [[2, 5], [0]]
        schedule.step()


def test_a_step_of_lbfgs_ends_where_it_was_evaluated() -> None:
    model, batches = net(), batches_for(6)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4, line_search_fn="strong_wolfe")
    schedule = BypassSchedule(model, optimizer, 3, 3, select="stuck", loss_fn=loss_fn, batches=batches)
    evaluated: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batches[0]) + schedule.penalty()
        loss.backward()
        evaluated.append(loss.item())
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert any(abs(loss_fn(model, batches[0]).item() - loss) < 1e-6 for loss in evaluated)


def test_gradients_of_what_is_held_count_in_no_norm() -> None:
    model = net()
    schedule = BypassSchedule(model, adam(model), 3, 3, select="stuck", loss_fn=loss_fn, batches=batches_for(6))
    loss_fn(model, batches_for(6)[0]).backward()
    for site in schedule.plan:
        gradient = surgery.delta_of(model, site).grad
        assert gradient is not None and tuple(gradient.nonzero().flatten().tolist()) == site.moving


def test_dead_units_come_to_life() -> None:
    torch.manual_seed(0)
    x = torch.rand(256, 2) * 2 - 1
    y = torch.stack([(4 * x).sin().prod(1), (3 * x).cos().sum(1)], 1)
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(model[0], 0, 1, 2)
    with torch.no_grad():
        model[0].bias.clamp_(min=-2.0)  # dead on the square, and not far away
    plain, losses = copy.deepcopy(model), {}
    for name, one in (("plain", plain), ("bypassed", model)):
        optimizer = adam(one)
        schedule = None
        if name == "bypassed":
            schedule = BypassSchedule(
                one, optimizer, 100, 200, comeback="lagrangian", delta_lr=5e-2,
                select="stuck", loss_fn=loss_fn, batches=[(x, y)],
            )  # fmt: skip
        for _ in range(500):
            optimizer.zero_grad()
            loss = loss_fn(one, (x, y))
            (loss + schedule.penalty() if schedule else loss).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        losses[name] = loss.item()
    left = {name: stuck(one, loss_fn, [(x, y)]).stuck for name, one in (("plain", plain), ("bypassed", model))}
    assert left["plain"] == 3 > left["bypassed"]
    assert losses["bypassed"] < 0.9 * losses["plain"], losses


def test_each_cycle_looks_anew_and_none_begins_where_nothing_is_stuck() -> None:
    model, batches = net(), batches_for(6)
    optimizer = adam(model)
    arguments: dict[str, Any] = {"select": "stuck", "loss_fn": loss_fn, "batches": iter(batches)}
    schedule = BypassSchedule(model, optimizer, 2, 2, cycles=3, rest=1, **arguments)
    assert [site.moving for site in schedule.plan] == [(2, 5), (0,)]
    for _ in range(4):
        train_step(model, optimizer, schedule)
    with torch.no_grad():
        model[0].bias.fill_(0.0)  # alive again, but for the last
    kill(model[0], 7)
    kill(model[2], 0)
    train_step(model, optimizer, schedule)
    assert schedule.phase == "opt1" and [site.moving for site in schedule.plan] == [(7,), (0,)]
    for _ in range(4):
        train_step(model, optimizer, schedule)
    with torch.no_grad():
        model[0].bias.fill_(0.0)
        model[2].bias.fill_(0.0)
    train_step(model, optimizer, schedule)
    assert schedule.phase == "done" and len(schedule.reports) == 2


def test_a_state_goes_on_with_its_plan() -> None:
    def begun(**arguments: Any) -> tuple[nn.Module, torch.optim.Optimizer, BypassSchedule]:
        model = net()
        optimizer = adam(model)
        return model, optimizer, BypassSchedule(model, optimizer, 4, 6, comeback="lagrangian", **arguments)

    measured = {"select": "stuck", "loss_fn": loss_fn, "batches": batches_for(6)}
    whole, before = begun(**measured), begun(**measured)
    for _ in range(12):
        train_step(*whole)
    for _ in range(6):
        train_step(*before)
    state = copy.deepcopy([part.state_dict() for part in reversed(before)])
    after = begun(plan=Plan.from_json(state[0]["plan"]))
    for part, own in zip(reversed(after), state, strict=True):
        part.load_state_dict(own)
    for _ in range(6):
        train_step(*after)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), after[0].parameters(), strict=True))
    with pytest.raises(BypassError, match=r"another plan for these sites; build the schedule with plan="):
        begun()[2].load_state_dict(state[0])


def test_a_state_goes_on_and_later_cycles_look_anew() -> None:
    batches = batches_for(6)

    def begun(plan: Plan | None = None) -> tuple[nn.Module, torch.optim.Optimizer, BypassSchedule]:
        model = net()
        optimizer = adam(model)
        measured: dict[str, Any] = {"select": "stuck", "loss_fn": loss_fn, "batches": batches}
        return model, optimizer, BypassSchedule(model, optimizer, 2, 2, cycles=2, plan=plan, **measured)

    before = begun()
    train_step(*before)
    state = copy.deepcopy([part.state_dict() for part in reversed(before)])
    after = begun(Plan.from_json(state[0]["plan"]))
    for part, own in zip(reversed(after), state, strict=True):
        part.load_state_dict(own)
    for model, optimizer, schedule in (before, after):
        train_step(model, optimizer, schedule)
        train_step(model, optimizer, schedule)
        kill(model[0], 7)  # type: ignore[index]
        train_step(model, optimizer, schedule)
        assert schedule.phase == "opt1" and next(site.moving for site in schedule.plan) == (2, 5, 7)


def test_replicas_do_what_each_would_alone() -> None:
    batch = torch.stack([batches_for(6)[i % 2][0] for i in range(3)]), torch.stack([batches_for(6)[0][1]] * 3)

    def models() -> list[nn.Sequential]:
        made = [net() for _ in range(3)]
        kill(made[1][0], 1)
        with torch.no_grad():
            made[2][0].bias.zero_()
            made[2][2].bias.zero_()
        return [model.double() for model in made]

    def lead(model: nn.Module, optimizer: torch.optim.Optimizer, row: int) -> BypassSchedule | None:
        one = [(batch[0][row].double(), batch[1][row].double())]
        try:
            return BypassSchedule(model, optimizer, 3, 4, delta_lr=0.1, select="stuck", loss_fn=loss_fn, batches=one)
        except PlanError:
            return None

    together, alone = models(), models()
    replicas = Replicas(together, [adam(model) for model in together])
    rows = iter(range(3))
    replicas.lead(lambda model, optimizer: lead(model, optimizer, next(rows)))
    assert [schedule and [site.moving for site in schedule.plan] for schedule in replicas.schedules] == [
        [(2, 5), (0,)], [(1, 2, 5), (0,)], None
    ]  # fmt: skip
    both = tuple(each.double() for each in batch)
    for _ in range(9):
        replicas.step(replicas.backward(loss_fn, both))
    for row, model in enumerate(alone):
        optimizer = adam(model)
        schedule = lead(model, optimizer, row)
        for _ in range(9):
            optimizer.zero_grad()
            loss = loss_fn(model, (both[0][row], both[1][row]))
            (loss + schedule.penalty() if schedule else loss).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        for mine, other in zip(together[row].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, other)


def test_equal_owners_share_their_code_whichever_channels_move() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(F.relu(self.fc1(x)))

    torch.manual_seed(1)
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 2))
    for index, block in enumerate([*model][:2]):
        kill(block.fc1, index)
    plan = bypass_fx.plan(model, select="stuck", loss_fn=loss_fn, batches=batches_for(6))
    assert [site.moving for site in plan] == [(0,), (1,)]
    assert Plan.from_json(plan.to_json()) == plan
    bypass_fx.extend(model, plan)
    assert type(model[0]) is type(model[1])


def test_the_trainer_bypasses_where_something_is_stuck_and_trains_on_where_nothing_is() -> None:
    data = digits()
    model = mlp(data)
    assert isinstance(model, nn.Sequential)
    settings = short(select="stuck", cycles=2)
    history = Trainer(model, data, settings).fit()
    titles = [moment.name for moment in history.moments if moment.name != "evaluation"]
    assert titles == ["θ*", "nothing stuck", "end"] and not history.reports
    assert history.moment("end").bypass == history.moment("end").baseline  # to the end, step by step the same
    model = mlp(data)
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    kill(first, 0)
    history = Trainer(model, data, short(select="stuck")).fit()
    (report,) = history.reports
    assert [arrival.site for arrival in report.arrivals] == [history.plan.sites[0].name]
