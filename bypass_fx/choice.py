"""Which sites the bypasses of a schedule take: planned once, or measured anew at each θ*."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn
from torch.optim import Optimizer

from bypass_fx.course import expect
from bypass_fx.measured import expect_known
from bypass_fx.passes.plan import Plan
from bypass_fx.stuck import stuck


class Choice:
    """A plan, or the arguments that the first bypass plans with; for the later ones that plan, or another look.

    Args:
        plan: the sites of the first bypass; None plans them.
        arguments: of `bypass_fx.plan`; with `select="stuck"` each later bypass looks anew.
        optimizer: what a probe steps with.
        cycles: how many bypasses there are to be.
    """

    def __init__(self, plan: Plan | None, arguments: dict[str, Any], optimizer: Optimizer, cycles: int) -> None:
        expect_known(arguments.get("select"), arguments, _schedule_s_own())
        if arguments.get("select") == "probe":
            arguments = {**arguments, "optimizer": optimizer}
        if "batches" in arguments and cycles > 1:
            arguments = {**arguments, "batches": [*arguments["batches"]]}  # one pass over them may be all there is
        self.plan, self.arguments = plan, arguments
        self._measuring = arguments if arguments.get("select") == "stuck" else {}

    def settle(self, plan: Plan) -> None:
        """This is what the first bypass took."""
        self.plan = plan
        self.arguments = {name: value for name, value in self.arguments.items() if name == "example_inputs"}

    def again(self, model: nn.Module) -> bool:
        """Whether there is something to bypass once more; `plan` is it then."""
        if self._measuring:
            arguments = {name: value for name, value in self._measuring.items() if name != "select"}
            self.plan = stuck(model, **arguments).plan
        return self.plan is not None and len(self.plan) > 0


def _schedule_s_own() -> list[str]:
    from bypass_fx.schedule import BypassSchedule  # which is made of this

    return [name for name in signature(BypassSchedule).parameters if name != "as_plan"]


def expect_same(saved: Plan, own: Plan) -> None:
    """A state that was saved with one plan goes on with no other.

    Raises:
        BypassError: the plans differ in their sites.
    """
    strange = sorted({site.name for site in saved} ^ {site.name for site in own})
    advice = "build the schedule with plan=Plan.from_json(state['plan'])"
    expect(not strange, f"state and model differ in the sites {strange}; {advice}")
    expect(saved.sites == own.sites, f"the state is of another plan for these sites; {advice}")
