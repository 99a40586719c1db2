"""An argument that does not fit is refused with the fix, and model and optimiser are as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bypass_fx import surgery
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule
from tests.bypasses import adam, mlp

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


def test_where_d_finds_no_place_in_the_optimiser_the_model_is_contracted_again() -> None:
    model = mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BypassError, match="leave out delta_lr"):
        BypassSchedule(model, torch.optim.LBFGS(model.parameters()), 3, 5, delta_lr=0.1)
    assert not surgery.is_extended(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
