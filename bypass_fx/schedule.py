"""The schedule of bypasses in the user's own training loop: opt1, opt2, the contraction, and what is kept of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import accept as acceptance
from bypass_fx import comeback as returns
from bypass_fx import param_group, surgery
from bypass_fx.arrival import Epsilon
from bypass_fx.bypass import Bypass
from bypass_fx.bypass_report import Arrival, NonFiniteError, ScheduleReport
from bypass_fx.choice import Choice, expect_same
from bypass_fx.course import AtBudget, Course, Unit, expect, expect_one_number
from bypass_fx.gamma import Adaptive, Gamma
from bypass_fx.lookout import Seen
from bypass_fx.passes.plan import Plan
from bypass_fx.readout import Reading, Readout, send
from bypass_fx.snapshot import Snapshot

__all__ = ["Arrival", "BypassSchedule", "NonFiniteError", "Phase", "ScheduleReport"]

Phase = Literal["opt1", "opt2", "train3", "done"]
FORMAT = 5


class BypassSchedule:
    """Leads a model through one bypass or several, as an LR scheduler leads a learning rate (Algorithm 1).

    opt1: `opt1` steps in the extended space, with loss L₂. opt2: the comeback, at most `opt2` steps; the loss is
    L₂ + γ(t)‖ADW‖ (eq. 17) or whatever the chosen return makes of it. A site whose norm falls below ε is projected at
    that moment, b_A ← b_A + A D b_W (eq. 15), and stays at D = 0; when all have arrived, the original architecture is
    restored and D leaves the optimiser, whose other state is not touched. train3: where `accept` or a further cycle
    waits for it, some steps in the original architecture. Then `step` does nothing and `penalty` is 0.

    Call `step` once after each `optimizer.step()`. Learning rates compose with LR schedulers, of torch and of timm,
    whether made before or after the schedule.

    Args:
        model: the model; extended here unless it is extended already.
        optimizer: the optimiser that steps the model; D is added to it as one more parameter group.
        opt1: steps of opt1; 0 starts with opt2.
        opt2: steps planned for the comeback, at least 1.
        gamma: γ(t), any function of t; needed by the returns "penalty" and "proximal".
        epsilon: a site has arrived when its norm is below: one number, one for each pattern of site names, or a
            `Total` for the sum over the sites still out.
        comeback: "homotopy" (ends at D = 0, always on time), "variety" (at A D W = 0 with D ≠ 0 where there is such a
            way, always on time), "lagrangian" (always on time), "proximal" (at D = 0, on time), "penalty" (the paper's,
            which may leave D ≠ 0 on strict sites; it hands over to proximal where it idles), "published" (the paper's,
            which stays as it is, and may never end), or a `Comeback`.
        lr: λ', the learning rate in opt2, on the scale of the first group's base rate; every group's rate changes by
            the same factor, while the optimiser steps (`group["lr"]` goes on showing λ). None leaves them.
        delta_lr: D's base learning rate; None takes the first group's.
        delta_weight_decay: D's weight decay.
        unit: what t counts in γ(t), "step" or "epoch" (then in fractions of one).
        steps_per_epoch: steps in an epoch, where t counts epochs.
        at_budget: what to do with sites still out after `opt2` steps: "contract" anyway, with a warning and an entry in
            the report, "rollback" to θ*, or "continue" until they arrive, as in the paper.
        accept: on which condition the outcome is kept: `NotWorse`, `BeatsForecast`, or a function of the model; None
            keeps it always. Where it fails, θ* and the optimiser's state come back.
        snapshot: where θ* and the optimiser's state are kept until then: "cpu", a folder, or None for nowhere. A D
            that an extended model brings along is not part of θ*.
        cycles: bypasses in a row, each with a fresh D and a θ* of its own; after a rollback no further one begins.
        rest: steps of train3 between two of them.
        penalty_every: k; in opt2 the constraint is evaluated in every k-th step only: the penalty counts k times there, and
            norms are taken and sites arrive only then. For the returns that ask for no more: "homotopy", "proximal",
            "penalty" and "published". None is 8 for "homotopy", whose way goes by no norm, and 1 for the others.
        plan: the sites to extend; None plans them. One that was made with `example_inputs` needs them here too, and so do
            further cycles of a model that was extended with them.
        **as_plan: arguments of `bypass_fx.plan`, such as `mode`. With `select="stuck"` each further cycle looks anew for
            channels that are stuck, and the schedule ends where there are none.

    Raises:
        BypassError: an argument doesn't fit, the model has no site, or nothing is stuck; model and optimiser are then as
            they were.

    Example:
        >>> import torch, bypass_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> schedule = bypass_fx.BypassSchedule(model, optimizer, opt1=10, opt2=20)
        >>> x, y = torch.randn(64, 4), torch.randn(64, 1)
        >>> while schedule.phase != "done":
        ...     loss = torch.nn.functional.mse_loss(model(x), y) + schedule.penalty()
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     schedule.step(loss)
        >>> len(schedule.report.arrivals), len(optimizer.param_groups), list(model.state_dict())
        (1, 1, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        opt1: int,
        opt2: int,
        *,
        gamma: Gamma | None = None,
        epsilon: Epsilon = 1e-4,
        comeback: str | returns.Comeback = "homotopy",
        lr: float | None = None,
        delta_lr: float | None = None,
        delta_weight_decay: float = 0.0,
        unit: Unit = "step",
        steps_per_epoch: int | None = None,
        at_budget: AtBudget = "contract",
        accept: acceptance.Accept | Callable[[nn.Module], Any] | None = None,
        snapshot: str | Path | None = "cpu",
        cycles: int = 1,
        rest: int = 0,
        penalty_every: int | None = None,
        plan: Plan | None = None,
        **as_plan: Any,
    ) -> None:
        self._course = Course(
            opt1, opt2, returns.resolve(comeback), gamma, epsilon, lr, delta_lr, delta_weight_decay, unit,
            steps_per_epoch, at_budget, cycles, rest, penalty_every,
        )  # fmt: skip
        self._accept = acceptance.resolve(accept)
        expect(
            snapshot is not None or not (accept or at_budget == "rollback"),
            "without a snapshot there is no way back to θ*; leave out snapshot=None, or accept= and at_budget='rollback'",
        )
        param_group.expect_optimizer(optimizer, surgery.unwrapped(model).parameters())
        param_group.rate_factor(optimizer, lr)
        self._model, self._optimizer, self._where = model, optimizer, snapshot
        self._choice = Choice(plan, as_plan, optimizer, cycles)
        self.phase: Phase = "opt1"
        self.reports: tuple[ScheduleReport, ...] = ()  # of the bypasses that are over
        self._earlier_steps = self._rested = 0  # of earlier cycles; those of train3 since the last bypass
        self._snapshot: Snapshot | None = None
        self._begin()

    @property
    def plan(self) -> Plan:
        """The sites of the last bypass; what a schedule needs to go on with a state, where they were measured."""
        return self._bypass.plan

    @property
    def report(self) -> ScheduleReport | None:
        """How the last bypass that is over went."""
        return self.reports[-1] if self.reports else None

    @property
    def gamma(self) -> Tensor:
        """γ(t), 0-dim; the same tensor throughout a bypass."""
        return self._bypass.gamma

    @property
    def out(self) -> frozenset[str]:
        """Names of the sites that have not arrived."""
        return self._bypass.out

    @property
    def norms(self) -> dict[str, float]:
        """Each site's norm after the last step of opt2."""
        return self._bypass.norms

    @property
    def steps(self) -> int:
        """Steps of opt1 and opt2 taken since the schedule began."""
        return self._earlier_steps + self._bypass.opt1_steps + self._bypass.opt2_steps

    def penalty(self, gamma: Tensor | None = None) -> Tensor:
        """What to add to the loss: γ(t) Σ‖ADW‖ over the sites still out where the return asks for it, else 0; 0-dim.

        Args:
            gamma: another γ to take, 0-dim.
        """
        term = self._bypass.penalty(gamma) if self._returning else None
        return torch.zeros_like(self._bypass.gamma) if term is None else term

    @property
    def under_way(self) -> Bypass | None:
        """The bypass between its begin and the contraction, for one who leads several models at once."""
        return None if self._bypass.over else self._bypass

    @property
    def alike(self) -> Hashable | None:
        """Where this is the same for two schedules of equal models, `penalty` of one, given γ, holds for both; or None."""
        key = self._course.comeback.alike() if self._returning else None
        return None if key is None else (key, self.out)

    @property
    def remembering(self) -> tuple[object, ...]:
        """What it was given that has a state of its own, which no other schedule may share."""
        adaptive = (self._course.gamma,) if isinstance(self._course.gamma, Adaptive) else ()
        return (self._course.comeback, *adaptive, *((self._accept,) if self._accept else ()))

    @torch.no_grad()
    def step(self, loss: Tensor | float | None = None, seen: Seen | None = None, look: bool = False) -> None:
        """Note one step of the optimiser: move on a phase, project the sites that arrived, contract when all have.

        Args:
            loss: the loss of the step; given, it is looked at as well as what the step made of the model.
            seen: what the step made of the model, where that has been measured already.
            look: whether all that moves is looked at now in any case.

        Raises:
            NonFiniteError: the loss, a parameter, D or a norm is NaN or infinite, as seen in every eighth step and at the end
                of a phase; names phase, step and site. θ* is back then, unless `snapshot` is None.
            BypassError: the loss is no single number; the step does not count then.
        """
        expect_one_number(loss)
        if self.phase == "train3":
            self._rest(loss)
        elif self.phase != "done":
            self._lead(loss, seen, look)

    @torch.no_grad()
    def finish(self) -> ScheduleReport:
        """End now, whatever the phase: sites still out are projected from where they are, and the outcome is kept, unasked.

        Raises:
            NonFiniteError: as `step`.
        """
        if not self._bypass.over:
            try:
                self._bypass.measure()
            except NonFiniteError as error:
                self._stop(error)
            self._contract(self._bypass.those_out())
        self._end()
        return self.reports[-1]

    @torch.no_grad()
    def rollback(self, reason: str = "asked for") -> None:
        """End now: θ*, the optimiser's state and that of the LR schedulers come back as they were before this bypass.

        Raises:
            BypassError: there is no snapshot.
        """
        expect(self._snapshot is not None, "there is no bypass under way with a snapshot of θ*")
        assert self._snapshot is not None
        if self._bypass.over:
            *earlier, last = self.reports
            self.reports = (*earlier, replace(last, rolled_back=reason))
        else:
            self.reports += (self._bypass.report(self._bypass.those_out() if self._bypass.norms else (), reason),)
            self._bypass.contract(drop=True)
        self._snapshot.restore(self._model, self._optimizer)
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Everything the schedule needs to go on exactly, beside the state dicts of the model and the optimiser.

        It holds θ* too, unless that is kept in a folder or nowhere.
        """
        return {
            "format": FORMAT,
            "phase": self.phase,
            "comeback": self._course.comeback.name,
            "plan": self.plan.to_json(),
            "bypass": self._bypass.state_dict(),
            "earlier_steps": self._earlier_steps,
            "rested": self._rested,
            "under_way": self._readout.state_dict(),
            "reports": [report.state_dict() for report in self.reports],
            "accept": self._accept.state_dict() if self._accept else {},
            "snapshot": self._snapshot.state_dict() if self._snapshot else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another schedule stopped.

        Load it into a new schedule with the same arguments, before the state dicts of the model and the optimiser: a
        bypass that was done is contracted here, so that theirs fit. Where the sites were measured (`select="stuck"` or
        "probe"), give the new one `plan=Plan.from_json(state["plan"])` too: later cycles look anew.

        Raises:
            BypassError: the state belongs to another comeback, to other sites or to another version.
        """
        expect(state.get("format") == FORMAT, "this is no state of this version's BypassSchedule; start a new bypass")
        expect(self.steps == 0 and self.phase != "done", "this schedule has begun; load the state into a new one")
        saved, own = state["comeback"], self._course.comeback.name
        expect(saved == own, f"the state is of a comeback {saved!r}, not {own!r}; build the schedule with {saved!r}")
        expect_same(Plan.from_json(state["plan"]), self.plan)
        self._bypass.load_state_dict(state["bypass"])
        if self._accept:
            self._accept.load_state_dict(state["accept"])
        if self._snapshot:
            self._snapshot.discard()
        kept, deltas = state["snapshot"], self._bypass.deltas
        self._snapshot = Snapshot.from_state(kept, self._optimizer, deltas) if kept else None
        self._earlier_steps, self._rested = state["earlier_steps"], state["rested"]
        self.reports = tuple(map(ScheduleReport.from_state, state["reports"]))
        self._readout.load_state_dict(state["under_way"])
        self._enter(state["phase"])
        if self.phase in ("train3", "done"):
            self._bypass.contract(drop=True)

    def _begin(self) -> None:
        sites = surgery.sites(self._model) if surgery.is_extended(self._model) else ()
        own = [surgery.delta_of(self._model, site) for site in sites]
        kept = Snapshot(self._model, self._optimizer, self._where, without=own) if self._where is not None else None
        try:
            if self._accept:
                self._accept.begin(self._model)
            self._bypass = Bypass(self._model, self._optimizer, self._course, self._choice.plan, self._choice.arguments)
        except Exception:
            if kept:
                kept.discard()
            raise
        self._snapshot = kept
        self._choice.settle(self.plan)
        self._rested = 0
        self._readout = Readout(self._bypass.gamma.device)  # of the losses of train3
        self._enter(self._bypass.phase)

    def _enter(self, phase: Phase) -> None:
        """Be in a phase, and note whether the coming step's loss has a penalty."""
        self.phase = phase
        # Read by a compiled loss, for which every value is a graph of its own.
        self._returning = phase == "opt2" and self._bypass.counts and self._course.comeback.penalises

    def _lead(self, loss: Tensor | float | None, seen: Seen | None, look: bool) -> None:
        try:
            self._bypass.step(loss, seen, look)
        except NonFiniteError as error:
            self._stop(error)
        if self._bypass.over:
            self._contract()
            self._judge()
        elif self._bypass.exhausted:
            self._give_up()
        else:
            self._enter(self._bypass.phase)

    def _stop(self, error: NonFiniteError) -> None:
        if self._snapshot is None:
            raise NonFiniteError(f"{error}; go back to a checkpoint and lower the learning rate") from error
        self.rollback(str(error))
        raise NonFiniteError(f"{error}; the model is at θ* again: lower the learning rate") from error

    def _give_up(self) -> None:
        told = self._bypass.what_is_out()
        if self._course.at_budget == "rollback":
            self.rollback(told)
            return
        warnings.warn(
            f"{told}; the loss may have jumped: give opt2 more steps, a steeper gamma, or comeback='homotopy'",
            stacklevel=5,
        )
        self._contract(self._bypass.those_out())
        self._judge()

    def _contract(self, left_out: tuple[Arrival, ...] = ()) -> None:
        report = self._bypass.report(left_out)
        if not self._bypass.over:
            self._bypass.contract()
        self.reports += (report,)
        self._enter("train3")

    def _rest(self, loss: Tensor | float | None) -> None:
        self._rested += 1
        if loss is not None:
            number = torch.as_tensor(loss).detach().reshape(1)
            self._look_at(self._readout.exchange(send(number), "train3", self._rested, measured=False))
        self._judge()

    def _look_at(self, reading: Reading | None) -> None:
        if reading is not None and not math.isfinite(reading.numbers[0]):
            self._stop(NonFiniteError(f"{reading.phase}, step {reading.step}: the loss is {reading.numbers[0]}"))

    def _judge(self) -> None:
        """Keep the outcome or not, when its time has come; then rest, begin the next cycle, or end."""
        more = len(self.reports) < self._course.cycles
        after = self._accept.after if self._accept else 0
        if self._accept and self._rested == after:
            self._rested -= 1  # a condition that raises is asked again after the next step
            if objection := self._accept.objection(self._model, self.steps - self._earlier_steps + after):
                self.rollback(objection)
                return
            self._rested = after
        if self._rested >= max(after, self._course.rest if more else 0):
            self._look_at(self._readout.flush())
            again = more and self._choice.again(self._model)
            self._end()
            if again:
                self._earlier_steps = self.steps
                self._begin()

    def _end(self) -> None:
        self._enter("done")
        if self._snapshot:
            self._snapshot.discard()
        self._snapshot = None
