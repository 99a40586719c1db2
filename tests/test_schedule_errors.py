"""An argument that does not fit is refused with the fix, and model and optimiser are as they were."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import bypass_fx
from bypass_fx import surgery
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule
from tests.bypasses import adam, begin, mlp, train_step, until_done

with warnings.catch_warnings(action="ignore"):  # of what it imports in turn
    from transformers.optimization import Adafactor

pytestmark = pytest.mark.usefixtures("small_heap")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; give a positive number"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"opt1": -1}, "opt1 is -1; give a number of steps, 0 or more"),
        ({"opt1": 2.5}, "opt1 is 2.5"),
        ({"opt2": 0}, "opt2 is 0; give a number of steps, 1 or more"),
        ({"comeback": "proxymal"}, "did you mean proximal"),
        ({"comeback": "penalty"}, "needs γ.*pass gamma="),
        ({"gamma": 0.6}, "gamma is 0.6, no function of t; pass bypass_fx.Linear"),
        ({"lr": 0.0}, "lr is 0.0; give a positive"),
        ({"delta_lr": -1.0}, "delta_lr is -1.0; give a positive"),
        ({"unit": "epoch"}, "needs steps_per_epoch"),
        ({"unit": "minute"}, "choose 'step' or 'epoch'"),
        ({"at_budget": "give up"}, "choose 'contract', 'continue' or 'rollback'"),
        ({"select": "nothing"}, "nothing"),
        ({"cycles": 0}, "cycles is 0; give a number, 1 or more"),
        ({"rest": -1}, "rest is -1; give a number of steps, 0 or more"),
        ({"epsilon": {"nothing": 1e-4}}, "no entry that fits the site '1'; add one for"),
        ({"epsilon": {"*": -1.0}}, "epsilon is -1.0"),
        ({"accept": 0.5}, "accept is 0.5; give bypass_fx.NotWorse"),
        ({"snapshot": None, "at_budget": "rollback"}, "no way back to θ"),
        ({"select": "probe"}, "pass loss_fn="),
        ({"come_back": "variety"}, "'come_back' is no known argument; did you mean comeback"),
        ({"modes": "all"}, "'modes' is no known argument; did you mean mode"),
        ({"xyz": 1}, "'xyz' is no known argument; give model, .*comeback, .*mode, select"),
        ({"example_input": None}, "'example_input' is no known argument; did you mean example_inputs?"),
        ({"example_inputs": 3}, "example_inputs is 3; give a tuple"),
        ({"select": "stuck", "loss_fn": len, "batches": [], "steps": 3}, "'steps' is no known argument"),
        ({"select": 3}, "select=3 is no choice of sites; give patterns"),
        ({"plan": 3}, "plan is a int; give what bypass_fx.plan"),
        ({"snapshot": False}, "snapshot is False; give 'cpu', a folder, or None"),
        ({"lr": float("inf")}, "lr is inf; give a positive"),
        ({"delta_weight_decay": float("inf")}, "delta_weight_decay is inf; give a number from 0 up"),
        ({"lr": "fast"}, "lr is 'fast'; give a positive"),
        ({"delta_weight_decay": torch.zeros(2)}, r"delta_weight_decay is tensor\(\[0., 0.\]\); give a number"),
        ({"delta_lr": 10**400}, "delta_lr is 10+; give a positive learning rate"),
        ({"delta_weight_decay": -0.1}, "delta_weight_decay is -0.1; give a number from 0 up"),
        ({"unit": "epoch", "steps_per_epoch": 2.5}, "needs steps_per_epoch, 1 or more"),
        ({"gamma": lambda t: "steep", "comeback": "proximal"}, "gamma gives no number at t = 0"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_with_the_fix_and_changes_nothing(
    arguments: dict[str, Any], message: str
) -> None:
    model = mlp()
    optimizer = adam(model)
    with pytest.raises(BypassError, match=message) as raised:
        BypassSchedule(model, optimizer, **{"opt1": 3, "opt2": 5, **arguments})
    assert "\n" not in str(raised.value)
    assert not surgery.is_extended(model)
    assert len(optimizer.param_groups) == 1


def test_an_optimiser_of_another_model_is_refused_before_anything_changes() -> None:
    model = mlp()
    with pytest.raises(BypassError, match=r"none of the model's parameters; build it from this model's"):
        BypassSchedule(model, adam(mlp()), 3, 5)
    assert not surgery.is_extended(model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(BypassError, match=r"a torch\.nn\.Module is needed, this is a int"):
        BypassSchedule(3, adam(mlp()), 3, 5)  # type: ignore[arg-type]
    for function in (bypass_fx.norms, bypass_fx.penalty, bypass_fx.contract, bypass_fx.sites):
        with pytest.raises(BypassError, match=r"a torch\.nn\.Module is needed, this is a int"):
            function(3)  # type: ignore[arg-type]


def test_where_d_finds_no_place_in_the_optimiser_the_model_is_contracted_again() -> None:
    model = mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BypassError, match="leave out delta_lr"):
        BypassSchedule(model, torch.optim.LBFGS(model.parameters()), 3, 5, delta_lr=0.1)
    assert not surgery.is_extended(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_whole_numbers_of_numpy_are_numbers_of_steps() -> None:
    model = mlp()
    accept = bypass_fx.NotWorse(lambda model: 1.0, after=np.int64(2))  # type: ignore[arg-type]
    numbers: dict[str, Any] = {"epsilon": np.float32(1e-4), "lr": np.float32(1e-3), "accept": accept}
    assert BypassSchedule(model, adam(model), np.int64(3), np.int64(5), **numbers).phase == "opt1"


@pytest.mark.parametrize(
    ("loss", "message"),
    [(torch.ones(16, 2), r"shape \[16, 2\]; give the step's mean loss"), ("low", "'low'; give one number")],
)
def test_a_loss_that_is_no_number_is_refused_and_the_step_does_not_count(loss: Any, message: str) -> None:
    model, optimizer, schedule = begin()
    with pytest.raises(BypassError, match=message):
        schedule.step(loss)
    assert schedule.steps == 0
    train_step(model, optimizer, schedule)
    assert schedule.steps == 1


def test_an_optimiser_that_makes_up_its_own_rate_is_refused() -> None:
    model = mlp()
    optimizer = Adafactor(model.parameters(), lr=None, relative_step=True)
    with pytest.raises(BypassError, match=r"Adafactor goes by no learning rate.*give it an lr"):
        BypassSchedule(model, optimizer, 3, 5)
    assert not surgery.is_extended(model) and len(optimizer.param_groups) == 1


def test_a_schedule_under_way_is_not_copied_and_one_that_is_done_is() -> None:
    model, optimizer, schedule = begin()
    with pytest.raises(BypassError, match=r"can't be copied or pickled: load its state_dict\(\)"):
        copy.deepcopy((optimizer, schedule))
    until_done(model, optimizer, schedule)
    assert copy.deepcopy((model, optimizer, schedule))[2].report == schedule.report
