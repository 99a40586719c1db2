"""The course of a bypass: the lengths of its phases, its return and its thresholds, checked as the user gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bypass_fx import arrival
from bypass_fx.arrival import Epsilon
from bypass_fx.comeback import Comeback
from bypass_fx.gamma import Adaptive, Gamma
from bypass_fx.numeric import is_above, is_count
from bypass_fx.passes.errors import BypassError

AtBudget = Literal["contract", "continue", "rollback"]
Unit = Literal["step", "epoch"]


@dataclass(frozen=True, slots=True)
class Course:
    """What `BypassSchedule` was told; see there.

    Raises:
        BypassError: a setting is out of range; names it and the fix.
    """

    opt1: int
    opt2: int
    comeback: Comeback
    gamma: Gamma | None
    epsilon: Epsilon
    lr: float | None
    delta_lr: float | None
    delta_weight_decay: float
    unit: Unit
    steps_per_epoch: int | None
    at_budget: AtBudget
    cycles: int
    rest: int
    penalty_every: int | None

    def __post_init__(self) -> None:
        for name, least in (("opt1", 0), ("opt2", 1), ("cycles", 1), ("rest", 0), ("every", 1)):
            value = getattr(self, name)
            what = "number" if name == "cycles" else "number of steps"
            called = "penalty_every" if name == "every" else name
            expect(is_count(value, least), f"{called} is {value!r}; give a {what}, {least} or more")
        arrival.check(self.epsilon)
        expect(
            self.at_budget in ("contract", "continue", "rollback"),
            f"at_budget is {self.at_budget!r}; choose 'contract', 'continue' or 'rollback'",
        )
        expect(self.unit in ("step", "epoch"), f"unit is {self.unit!r}; choose 'step' or 'epoch'")
        counted = self.unit == "step" or is_count(self.steps_per_epoch, 1)
        expect(counted, "unit='epoch' needs steps_per_epoch, 1 or more")
        expect(
            self.gamma is not None or not self.comeback.uses_gamma,
            f"the comeback {self.comeback.name!r} needs γ(t); pass gamma=bypass_fx.Linear(0.005), say",
        )
        expect(
            self.every == 1 or self.comeback.may_skip,
            f"the comeback {self.comeback.name!r} needs the constraint in every step; leave out penalty_every",
        )
        _expect_function(self.gamma)
        for name in ("lr", "delta_lr"):
            rate = getattr(self, name)
            told = f"{name} is {rate!r}; give a positive learning rate, or None"
            expect(rate is None or is_above(rate, 0), told)
        decay = self.delta_weight_decay
        expect(is_above(decay, 0, or_at=True), f"delta_weight_decay is {decay!r}; give a number from 0 up")

    @property
    def every(self) -> int:
        """k: the constraint is evaluated in every k-th step of opt2."""
        return self.comeback.every if self.penalty_every is None else self.penalty_every

    @property
    def per_unit(self) -> int:
        """Steps in a unit of t."""
        return self.steps_per_epoch if self.unit == "epoch" and self.steps_per_epoch else 1


def _expect_function(gamma: Gamma | None) -> None:
    expect(gamma is None or callable(gamma), f"gamma is {gamma!r}, no function of t; pass bypass_fx.Linear(slope)")
    if gamma is None or isinstance(gamma, Adaptive):  # which is asked step by step
        return
    try:
        float(gamma(0.0))
    except (TypeError, ValueError) as error:
        raise BypassError(f"gamma gives no number at t = 0 ({error}); pass bypass_fx.Linear(slope), say") from error


def expect(holds: bool, message: str) -> None:
    """Raise a BypassError with the message, unless it holds."""
    if not holds:
        raise BypassError(message)


def expect_one_number(loss: Any) -> None:
    """Check the loss of a step, if there is one, without waiting for a GPU.

    Raises:
        BypassError: it is no single number.
    """
    if isinstance(loss, Tensor):
        shape = list(loss.shape)
        expect(loss.numel() == 1, f"the loss given to step has shape {shape}; give the step's mean loss, one number")
    elif loss is not None:
        try:
            float(loss)
        except (TypeError, ValueError):
            raise BypassError(f"the loss given to step is {loss!r}; give one number, or nothing") from None
