"""Several processes that train one model: all of them stop in the same step, whichever has met what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import bypass_fx
from bypass_fx.bypass import LOOKS_EVERY
from tests.bypasses import begin


@pytest.fixture(autouse=True)
def two() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("opt1", [20, 5], ids=["in the middle of opt1", "at its end"])
@pytest.mark.parametrize("number", [float, torch.tensor])
@pytest.mark.parametrize("own", [True, False], ids=["with the loss", "without"])
def test_the_process_with_the_loss_and_the_others_stop_in_the_same_step(
    own: bool, number: Callable[[float], Any], opt1: int
) -> None:
    """The gradients are averaged, so what one has met moves the parameters of all."""
    model, _, schedule = begin(opt1=opt1)
    schedule.step(number(1.0))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(float("nan"))
    at = min(opt1, LOOKS_EVERY)
    told = rf"opt1, step {at}: {'the loss is nan; ' if own else ''}.*0\.bias is not finite"
    losses = [number(float("nan") if own and step == 2 else 1.0) for step in range(2, 20)]
    with pytest.raises(bypass_fx.NonFiniteError, match=told):
        any(map(schedule.step, losses))
    assert schedule.steps == at or schedule.phase == "done"
