"""The schedule of one bypass in the user's own training loop: opt1, opt2 and the contraction (Algorithm 1)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import comeback as returns
from bypass_fx import constraint, param_group, surgery
from bypass_fx.gamma import Gamma
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import Plan

Phase = Literal["opt1", "opt2", "done"]
AtBudget = Literal["contract", "continue"]
FORMAT = 1


class NonFiniteError(BypassError):
    """D or its norm became NaN or infinite during a bypass."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A site that was projected: after which step of opt2, and how far from its constraint it was (‖ADW‖ or ‖D‖)."""

    site: str
    step: int
    norm: float


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """How a bypass went: its steps, the sites that arrived, and those that were contracted while still out."""

    comeback: str
    opt1_steps: int
    opt2_steps: int
    arrivals: tuple[Arrival, ...]
    left_out: tuple[Arrival, ...] = ()


class BypassSchedule:
    """Leads a model through one bypass, as an LR scheduler leads a learning rate (Algorithm 1).

    opt1: `opt1` steps in the extended space, with loss L₂. opt2: the comeback, at most `opt2` steps; the loss is
    L₂ + γ(t)‖ADW‖ (eq. 17) or whatever the chosen return makes of it. A site whose norm falls below ε is projected at
    that moment, b_A ← b_A + A D b_W (eq. 15), and stays at D = 0; when all have arrived, the original architecture is
    restored and D leaves the optimiser, whose other state is not touched. Then `step` does nothing and `penalty` is 0.

    Call `step` once after each `optimizer.step()`. Learning rates compose with LR schedulers, of torch and of timm,
    whether made before or after the schedule.

    Args:
        model: the model; extended here unless it is extended already.
        optimizer: the optimiser that steps the model; D is added to it as one more parameter group.
        opt1: steps of opt1; 0 starts with opt2.
        opt2: steps planned for the comeback, at least 1.
        gamma: γ(t), any function of t; needed by the returns "penalty" and "proximal".
        epsilon: a site has arrived when its norm is below.
        comeback: "homotopy" (ends at D = 0, always on time), "proximal" (ends at D = 0), "penalty" (the paper's, which
            may leave D ≠ 0 on strict sites, and may never end), or a `Comeback`.
        lr: λ', the learning rate in opt2, on the scale of the first group's base rate; every group's rate changes by
            the same factor, while the optimiser steps (`group["lr"]` goes on showing λ). None leaves them.
        delta_lr: D's base learning rate; None takes the first group's.
        delta_weight_decay: D's weight decay.
        unit: what t counts in γ(t), "step" or "epoch" (then in fractions of one).
        steps_per_epoch: steps in an epoch, where t counts epochs.
        at_budget: what to do with sites still out after `opt2` steps: "contract" anyway, with a warning and an entry in
            the report, or "continue" until they arrive, as in the paper.
        plan: the sites to extend; None plans them.
        **as_plan: arguments of `bypass_fx.plan`, such as `mode`.

    Raises:
        BypassError: an argument doesn't fit, or the model has no site; model and optimiser are then as they were.

    Example:
        >>> import torch, bypass_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> schedule = bypass_fx.BypassSchedule(model, optimizer, opt1=10, opt2=20)
        >>> x, y = torch.randn(64, 4), torch.randn(64, 1)
        >>> while schedule.phase != "done":
        ...     loss = torch.nn.functional.mse_loss(model(x), y) + schedule.penalty()
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     schedule.step()
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
        epsilon: float = 1e-4,
        comeback: str | returns.Comeback = "homotopy",
        lr: float | None = None,
        delta_lr: float | None = None,
        delta_weight_decay: float = 0.0,
        unit: Literal["step", "epoch"] = "step",
        steps_per_epoch: int | None = None,
        at_budget: AtBudget = "contract",
        plan: Plan | None = None,
        **as_plan: Any,
    ) -> None:
        self._comeback = returns.resolve(comeback)
        _expect(isinstance(opt1, int) and opt1 >= 0, f"opt1 is {opt1!r}; give a number of steps, 0 or more")
        _expect(isinstance(opt2, int) and opt2 >= 1, f"opt2 is {opt2!r}; give a number of steps, 1 or more")
        _expect(epsilon > 0 and math.isfinite(epsilon), f"epsilon is {epsilon!r}; give a positive number, such as 1e-4")
        _expect(at_budget in ("contract", "continue"), f"at_budget is {at_budget!r}; choose 'contract' or 'continue'")
        _expect(unit in ("step", "epoch"), f"unit is {unit!r}; choose 'step' or 'epoch'")
        _expect(unit == "step" or (steps_per_epoch or 0) >= 1, "unit='epoch' needs steps_per_epoch, 1 or more")
        _expect(
            gamma is not None or not self._comeback.uses_gamma,
            f"the comeback {self._comeback.name!r} needs γ(t); pass gamma=bypass_fx.Linear(0.005), say",
        )
        _expect(gamma is None or callable(gamma), f"gamma is {gamma!r}, no function of t; pass bypass_fx.Linear(slope)")
        for name, rate in (("lr", lr), ("delta_lr", delta_lr)):
            _expect(rate is None or rate > 0, f"{name} is {rate!r}; give a positive learning rate, or None")
        param_group.expect_optimizer(optimizer, model.parameters())
        self._rate_factor = _rate_factor(optimizer, lr)

        self._model, self._optimizer = model, optimizer
        self._gamma = gamma
        self._epsilon = epsilon
        self._opt1, self._opt2 = opt1, opt2
        self._per_unit = steps_per_epoch if unit == "epoch" and steps_per_epoch else 1
        self._at_budget = at_budget
        self._deltas = self._embed(delta_lr, delta_weight_decay, plan, as_plan)

        self._delta_ids = {id(delta) for delta in self._deltas.values()}
        first = next(iter(self._deltas.values()))
        wide = torch.promote_types(first.dtype, torch.float32)
        self.gamma = torch.zeros((), dtype=wide, device=first.device)  # γ(t); changed in place, so nothing recompiles
        self.out = frozenset(self._deltas)  # names of the sites that have not arrived
        self.norms: dict[str, float] = {}  # each site's norm after the last step of opt2
        self.phase: Phase = "opt1"
        self.report: ScheduleReport | None = None
        self._arrivals: list[Arrival] = []
        self._opt1_steps = self._opt2_steps = 0
        self._scaled: param_group.ScaledRate | None = None
        if opt1 == 0:
            self._turn_back()

    @property
    def steps(self) -> int:
        """Steps taken since the schedule began, those after the contraction left out."""
        return self._opt1_steps + self._opt2_steps

    def penalty(self) -> Tensor:
        """What to add to the loss: γ(t) Σ‖ADW‖ over the sites still out where the return asks for it, else 0; 0-dim."""
        term = self._comeback.penalty(self._model, self.out, self.gamma) if self.phase == "opt2" else None
        return torch.zeros_like(self.gamma) if term is None else term

    @torch.no_grad()
    def step(self) -> None:
        """Note one step of the optimiser: move on a phase, project the sites that arrived, contract when all have.

        Raises:
            NonFiniteError: a site's D or norm is NaN or infinite; names the phase, the step and the site.
        """
        if self.phase == "opt1":
            self._walk()
        elif self.phase == "opt2":
            self._come_back()

    def finish(self) -> ScheduleReport:
        """Contract now, whatever the phase: every site still out is projected from where it is."""
        if self.report is None:
            with torch.no_grad():
                self.norms = dict(self._read(self._norms()))
            self._contract(self._those_out())
        assert self.report is not None
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """Everything the schedule needs to go on exactly, beside the state dicts of the model and the optimiser."""
        return {
            "format": FORMAT,
            "phase": self.phase,
            "opt1_steps": self._opt1_steps,
            "opt2_steps": self._opt2_steps,
            "out": sorted(self.out),
            "norms": dict(self.norms),
            "arrivals": [asdict(arrival) for arrival in self._arrivals],
            "left_out": [asdict(arrival) for arrival in self.report.left_out] if self.report else [],
            "comeback": self._comeback.name,
            "comeback_state": self._comeback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another schedule stopped.

        Load it into a new schedule with the same arguments, before the state dicts of the model and the optimiser: a
        bypass that was done is contracted here, so that theirs fit.

        Raises:
            BypassError: the state belongs to another comeback, to other sites or to another version.
        """
        _expect(state.get("format") == FORMAT, "this is no state of this version's BypassSchedule; start a new bypass")
        _expect(self.steps == 0 and self.phase != "done", "this schedule has begun; load the state into a new one")
        saved, own = state["comeback"], self._comeback.name
        _expect(saved == own, f"the state is of a comeback {saved!r}, not {own!r}; build the schedule with {saved!r}")
        arrivals = [Arrival(**entry) for entry in state["arrivals"]]
        left_out = tuple(Arrival(**entry) for entry in state["left_out"])
        known = {*state["out"], *(arrival.site for arrival in (*arrivals, *left_out))}
        strange = sorted(known ^ self._deltas.keys())
        _expect(not strange, f"state and model differ in the sites {strange}; extend the model with the same plan")
        self._opt1_steps, self._opt2_steps = state["opt1_steps"], state["opt2_steps"]
        self._arrivals = arrivals
        self._comeback.load_state_dict(state["comeback_state"])
        if state["phase"] == "opt2" and self.phase == "opt1":
            self._turn_back()
        elif self.phase == "opt2":
            self._set_gamma()
        self.out = frozenset(state["out"])
        if state["phase"] == "done":
            self._contract(left_out)
        self.norms = dict(state["norms"])

    def _embed(
        self, lr: float | None, weight_decay: float, plan: Plan | None, as_plan: Mapping[str, Any]
    ) -> dict[str, nn.Parameter]:
        extended = surgery.is_extended(self._model)
        _expect(
            not extended or (plan is None and not as_plan),
            "the model is extended already, so it can't be planned again; leave out plan= and its arguments",
        )
        if not extended:
            surgery.extend(self._model, plan, **as_plan)
        try:
            sites = surgery.sites(self._model)
            deltas = {site.name: surgery.delta_of(self._model, site) for site in sites}
            names = [site.parameter for site in sites]
            param_group.add(self._optimizer, [*deltas.values()], self._model.parameters(), lr, weight_decay, names)
        except Exception:
            if not extended:
                surgery.contract(self._model)
            raise
        return deltas

    def _walk(self) -> None:
        self._opt1_steps += 1
        largest = [delta.abs().amax().to(self.gamma) for delta in self._deltas.values()]
        self._read(torch.stack(largest))
        if self._opt1_steps >= self._opt1:
            self._turn_back()

    def _turn_back(self) -> None:
        self.phase = "opt2"
        self._set_gamma()
        self._scaled = param_group.ScaledRate(self._optimizer, self._rate_of)

    def _rate_of(self, group: Mapping[str, Any]) -> float:
        only_d = all(id(parameter) in self._delta_ids for parameter in group["params"])
        return self._rate_factor * (self._comeback.pace(self._opt2_steps, self._opt2) if only_d else 1.0)

    def _come_back(self) -> None:
        for name in self._deltas.keys() - self.out:
            self._deltas[name].zero_()  # the optimiser's momentum moves even what has no gradient
        norms = self._norms()
        rate = param_group.current_lr(self._optimizer, next(iter(self._deltas.values())))
        moment = returns.Moment(norms, self.gamma, self._opt2_steps, self._opt2, rate * self._rate_factor)
        factors = self._comeback.shrink(moment)
        if factors is not None:
            # What is within ε already is folded in from where it is; to shrink it first would lose A D b_W.
            factors = torch.where(norms < self._epsilon, torch.ones_like(factors), factors)
            for delta, factor in zip(self._deltas.values(), factors, strict=True):
                delta.mul_(factor.to(delta))
            norms = norms * factors
        self._opt2_steps += 1
        self.norms = dict(self._read(norms))
        self._project(frozenset(name for name in self.out if self.norms[name] < self._epsilon))
        self._set_gamma()
        if not self.out:
            self._contract()
        elif self._opt2_steps >= self._opt2 and self._at_budget == "contract":
            self._give_up()

    def _project(self, arrived: frozenset[str]) -> None:
        names = [name for name in self._deltas if name in arrived]
        if names:
            surgery.project(self._model, names)
            self._arrivals += [Arrival(name, self._opt2_steps, self.norms[name]) for name in names]
            self.out -= arrived

    def _give_up(self) -> None:
        left_out = self._those_out()
        furthest = max(left_out, key=lambda arrival: arrival.norm)
        self._contract(left_out)
        warnings.warn(
            f"opt2 ended after its {self._opt2} steps with {len(left_out)} of {len(self._deltas)} sites still out, "
            f"{furthest.site!r} furthest with a norm of {furthest.norm:.3g}; the loss may have jumped: give opt2 more "
            "steps, a steeper gamma, or comeback='homotopy'",
            stacklevel=5,
        )

    def _contract(self, left_out: tuple[Arrival, ...] = ()) -> None:
        surgery.contract(self._model)
        param_group.remove(self._optimizer, [*self._deltas.values()])
        if self._scaled:
            self._scaled.remove()
        self.phase = "done"
        self.out = frozenset()
        self.report = ScheduleReport(
            self._comeback.name, self._opt1_steps, self._opt2_steps, tuple(self._arrivals), left_out
        )

    def _norms(self) -> Tensor:
        norms = constraint.norms(self._model)
        return torch.stack([norms[name].to(self.gamma) for name in self._deltas])

    def _read(self, values: Tensor) -> list[tuple[str, float]]:
        """One number per site brought to the host, the one synchronisation of a step."""
        numbers = list(zip(self._deltas, values.tolist(), strict=True))
        for name, number in numbers:
            if not math.isfinite(number):
                step = self._opt1_steps if self.phase == "opt1" else self._opt2_steps
                raise NonFiniteError(
                    f"{self.phase}, step {step}: D of site {name!r} is not finite (norm {number}); "
                    "go back to a checkpoint and lower the learning rate"
                )
        return numbers

    def _those_out(self) -> tuple[Arrival, ...]:
        return tuple(Arrival(name, self._opt2_steps, self.norms[name]) for name in self._deltas if name in self.out)

    def _set_gamma(self) -> None:
        if self._gamma is not None:
            self.gamma.fill_(float(self._gamma(self._opt2_steps / self._per_unit)))


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise BypassError(message)


def _rate_factor(optimizer: Optimizer, lr: float | None) -> float:
    if lr is None:
        return 1.0
    base = param_group.base_lr(optimizer.param_groups[0])
    _expect(bool(base) and float(base) > 0, f"lr={lr} can't be set beside a learning rate of {base}; set one above 0")
    return lr / float(base)
