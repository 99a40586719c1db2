"""Promises of ε: for each site, by pattern, or for the sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bypass_fx.arrival import Threshold, Total
from bypass_fx.passes.errors import BypassError
from tests.bypasses import begin, train_step

NORMS = {"a": 0.5, "b": 2.0, "c": 0.0}
OUT = frozenset({"a", "b"})  # c has arrived


@given(st.floats(0.01, 4), st.booleans())
def test_the_host_and_the_device_agree(epsilon: float, total: bool) -> None:
    threshold = Threshold(Total(epsilon) if total else epsilon, [*NORMS], like=torch.zeros((), dtype=torch.float64))
    near = threshold.within(torch.tensor([*NORMS.values()], dtype=torch.float64)).tolist()
    assert threshold.arrived(NORMS, OUT) == [
        name for name, close in zip(NORMS, near, strict=True) if close and name in OUT
    ]


def test_a_total_lets_all_arrive_together_and_numbers_each_for_itself() -> None:
    like = torch.zeros(())
    assert Threshold(1.0, [*NORMS], like).arrived(NORMS, OUT) == ["a"]
    assert Threshold(Total(2.4), [*NORMS], like).arrived(NORMS, OUT) == []
    assert Threshold(Total(2.6), [*NORMS], like).arrived(NORMS, OUT) == ["a", "b"]
    assert Threshold({"b": 3.0, "*": 0.1}, [*NORMS], like).arrived(NORMS, OUT) == ["b"]


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf"), "small"])
def test_a_total_that_is_no_positive_number_is_refused(epsilon: float) -> None:
    with pytest.raises(BypassError, match="give a positive number"):
        Total(epsilon)


def test_a_schedule_takes_them() -> None:
    model, optimizer, schedule = begin(1, 9, epsilon={"1": 1e9, "*": 1e-9})
    for _ in range(2):
        train_step(model, optimizer, schedule)
    assert schedule.out == {"3"}
    model, optimizer, schedule = begin(1, 9, epsilon=Total(1e9))
    for _ in range(2):
        train_step(model, optimizer, schedule)
    assert schedule.phase == "done"
