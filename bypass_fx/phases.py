"""The phases of a run: how long they are in steps, and the schedule that leads a model through a bypass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.optim import Optimizer

from bypass_fx.accept import Accept
from bypass_fx.course import AtBudget
from bypass_fx.passes.errors import PlanError
from bypass_fx.passes.plan import Plan
from bypass_fx.passes.plan_text import no_site
from bypass_fx.passes.units import ExampleInputs
from bypass_fx.schedule import BypassSchedule
from bypass_fx.settings import Settings, parse_gamma


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the phases are, in steps; train1 is the most it may take."""

    epoch: int
    train1: int
    opt1: int
    opt2: int
    train3: int
    cycles: int

    @property
    def cycle(self) -> int:
        """Steps of one bypass with what follows it."""
        return self.opt1 + self.opt2 + self.train3

    @property
    def total(self) -> int:
        """Steps that each arm has taken at the end, at most."""
        return self.train1 + self.cycles * self.cycle

    @classmethod
    def of(cls, settings: Settings, epoch: int) -> Lengths:
        """Of these settings, with so many steps in an epoch."""
        opt1 = settings.opt1 * epoch if settings.n is None else settings.n
        return cls(
            epoch, settings.train1 * epoch, opt1, settings.opt2 * epoch, settings.train3 * epoch, settings.cycles
        )


def embedded(
    model: nn.Module,
    optimizer: Optimizer,
    settings: Settings,
    plan: Plan,
    lengths: Lengths,
    accept: Accept | None = None,
    example_inputs: ExampleInputs | None = None,
) -> BypassSchedule:
    """The model extended by the plan, under the schedule that the settings describe; θ* is kept where it may be needed.

    With "baseline" that is where the bypass becomes NaN: the run must live to keep the other arm.
    """
    if not plan.sites:
        raise PlanError(no_site(plan, settings.pattern))
    at_budget = cast(AtBudget, settings.at_budget)
    comes_back = accept or at_budget == "rollback" or settings.accept == "baseline"
    return BypassSchedule(
        model,
        optimizer,
        opt1=lengths.opt1,
        opt2=lengths.opt2,
        gamma=parse_gamma(settings.gamma),
        epsilon=settings.epsilon,
        comeback=settings.comeback,
        lr=settings.return_lr,
        delta_lr=None if settings.delta_rate == 1 else settings.delta_rate * settings.lr,
        unit="epoch" if settings.gamma_unit == "epoch" else "step",
        steps_per_epoch=lengths.epoch,
        plan=plan,
        example_inputs=example_inputs,
        at_budget=at_budget,
        accept=accept,
        snapshot="cpu" if comes_back else None,  # a run has checkpoints
    )
