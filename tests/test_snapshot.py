"""What a snapshot gives back goes to where it came from, whatever else came to the optimiser in the meantime."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from bypass_fx import param_group, surgery
from bypass_fx import snapshot as snapshots
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule
from bypass_fx.snapshot import Snapshot
from tests.bypasses import X, Y, adam, begin, mlp, train_step

pytestmark = pytest.mark.usefixtures("small_heap")


def walk(optimizer: torch.optim.Optimizer, *pairs: Any, steps: int = 3) -> None:
    for _ in range(steps):
        for model, schedule in pairs:
            (nn.functional.mse_loss(model(X), Y) + schedule.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for _, schedule in pairs:
            schedule.step()


def test_schedulers_of_one_kind_get_their_own_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = adam(model)
    drivers = [lr_scheduler.ExponentialLR(optimizer, gamma) for gamma in (0.9, 0.8, 0.7)]
    snapshot = Snapshot(model, optimizer)
    in_order = list(param_group.schedulers(optimizer))
    gc.collect()  # which changes the order in which they are found; here it is surely another
    monkeypatch.setattr(param_group, "schedulers", lambda _: reversed(in_order))
    snapshot.restore(model, optimizer)
    assert [driver.gamma for driver in drivers] == [0.9, 0.8, 0.7]


def test_in_another_process_the_most_alike_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, list[lr_scheduler.ExponentialLR]]:
        model = mlp()
        optimizer = adam(model)
        return model, optimizer, [lr_scheduler.ExponentialLR(optimizer, gamma) for gamma in (0.9, 0.8, 0.7)]

    model, optimizer, drivers = made()
    train_step_of(model, optimizer)
    for driver in drivers:
        driver.step()
    state = Snapshot(model, optimizer).state_dict()
    model, optimizer, drivers = made()
    in_order = list(param_group.schedulers(optimizer))
    monkeypatch.setattr(param_group, "schedulers", lambda _: reversed(in_order))
    Snapshot.from_state(state, optimizer).restore(model, optimizer)
    assert [(driver.gamma, driver.last_epoch) for driver in drivers] == [(0.9, 1), (0.8, 1), (0.7, 1)]


def train_step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.functional.mse_loss(model(X), Y).backward()
    optimizer.step()


def test_a_schedulers_containers_stay_of_their_kind() -> None:
    model = mlp()
    optimizer = adam(model)
    driver = lr_scheduler.MultiStepLR(optimizer, [3, 4])
    schedule = BypassSchedule(model, optimizer, 3, 5)
    schedule.rollback()
    assert driver.milestones == Counter([3, 4]) and [*driver.milestones.elements()] == [3, 4]


def test_a_group_that_came_during_the_bypass_stays_as_it_is() -> None:
    model, optimizer, schedule = begin()
    start = [parameter.clone() for name, parameter in model.named_parameters() if "delta" not in name]
    extra = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    train_step(model, optimizer, schedule)
    schedule.rollback()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    assert optimizer.param_groups[1]["params"] == [extra]
    assert all(map(torch.equal, start, model.parameters()))


@pytest.mark.parametrize("first", [0, 1])
def test_one_model_rolls_back_while_another_under_the_same_optimiser_is_out(first: int) -> None:
    models = [mlp(), mlp()]
    optimizer = torch.optim.Adam([*models[0].parameters(), *models[1].parameters()], 0.01)
    driver = lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    pairs = [(model, BypassSchedule(model, optimizer, 3, 5)) for model in models]
    walk(optimizer, *pairs)
    pairs[first][1].rollback()
    assert not surgery.is_extended(models[first])
    assert len(driver.base_lrs) == len(optimizer.param_groups) == 2
    while pairs[1 - first][1].phase != "done":
        walk(optimizer, *pairs, steps=1)
        driver.step()
    assert len(driver.base_lrs) == len(optimizer.param_groups) == 1
    assert not any(map(surgery.is_extended, models))


def test_a_scheduler_that_knows_ds_group_already_forgets_it() -> None:
    model = surgery.extend(mlp())
    d, own = [], []
    for name, parameter in model.named_parameters():
        (d if "delta" in name else own).append(parameter)
    optimizer = torch.optim.Adam([{"params": d, "lr": 0.5}, {"params": own}], 0.01)
    driver = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    BypassSchedule(model, optimizer, 3, 5).rollback()
    assert driver.base_lrs == [0.01] and [group["lr"] for group in optimizer.param_groups] == [0.01]


DRIVERS: dict[str, Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = {
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20),
    "warm-up": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8),
    "swa": lambda optimizer: SWALR(optimizer, swa_lr=1e-3, anneal_epochs=8),
}


@pytest.mark.parametrize("make", DRIVERS.values(), ids=DRIVERS)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_scheduler_made_during_the_bypass_goes_on_from_its_own_rates(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], resumed: bool
) -> None:
    model, optimizer, schedule = begin()
    plain = adam(mlp())
    driver, alone = make(optimizer), make(plain)
    for step in range(12):
        if step == 2:
            if resumed:
                parts = (schedule, model, optimizer, driver)
                states = copy.deepcopy([part.state_dict() for part in parts])
                model, optimizer, schedule = begin()
                driver = make(optimizer)
                for part, state in zip((schedule, model, optimizer, driver), states, strict=True):
                    part.load_state_dict(state)
            schedule.rollback()
        train_step(model, optimizer, schedule)
        plain.step()
        driver.step()
        alone.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_a_place_that_can_hold_no_snapshot_is_refused(tmp_path: Path) -> None:
    model = mlp()
    (tmp_path / "file").touch()
    with pytest.raises(BypassError, match="give another folder, or 'cpu'"):
        BypassSchedule(model, adam(model), 3, 5, snapshot=tmp_path / "file")
    assert not surgery.is_extended(model)


def test_a_model_without_values_is_refused() -> None:
    model = mlp().to("meta")
    with pytest.raises(BypassError, match=r"0\.weight is on the meta device"):
        BypassSchedule(model, adam(model), 3, 5)
    assert not surgery.is_extended(model)


def test_named_tuples_and_counters_come_back_as_such() -> None:
    from typing import NamedTuple

    class Pair(NamedTuple):
        first: float
        second: torch.Tensor

    tensors: dict[str, torch.Tensor] = {}
    kept = snapshots.keep(Pair(0.5, torch.ones(2)), "pair", tensors)
    found = snapshots.back(kept, tensors, None)
    assert type(found) is Pair and found.first == 0.5 and torch.equal(found.second, torch.ones(2))
