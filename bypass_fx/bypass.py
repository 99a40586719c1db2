"""One bypass of a model: embed, opt1, opt2 and proj (Algorithm 1), one optimiser step at a time."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import constraint, gradient_averaging, param_group, surgery
from bypass_fx.arrival import Threshold
from bypass_fx.bypass_report import Arrival, ScheduleReport
from bypass_fx.comeback import Comeback, Moment
from bypass_fx.course import Course, expect
from bypass_fx.damped_step import DampedStep, HeldStill
from bypass_fx.gamma import Adaptive
from bypass_fx.lookout import Lookout, Seen
from bypass_fx.moving import Moving, mask
from bypass_fx.passes.fold import in_fold_order
from bypass_fx.passes.matrices import tensor_named
from bypass_fx.passes.plan import Plan
from bypass_fx.rescaled import rescale

LOOKS_EVERY = 8  # steps, at all that moves: what is not finite stays so


class Bypass:
    """A bypass under way: what `BypassSchedule` leads, once in each cycle.

    `over` is true once the original architecture is restored, `exhausted` once opt2 has used up its budget before.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, course: Course, plan: Plan | None, as_plan: Mapping[str, Any]
    ) -> None:
        self._model, self._optimizer, self._course = model, optimizer, course
        self._rate_factor = param_group.rate_factor(optimizer, course.lr)
        self.plan, self._deltas = self._embed(plan, as_plan)
        self._root = surgery.root_of(model)
        self._delta_ids = {id(delta) for delta in self._deltas.values()}
        first = next(iter(self._deltas.values()))
        wide = torch.promote_types(first.dtype, torch.float32)
        self.gamma = torch.zeros((), dtype=wide, device=first.device)  # γ(t); changed in place, so nothing recompiles
        moving = Moving(model, optimizer, self._deltas, like=self.gamma)
        self.lookout = Lookout([*self._deltas], moving, like=self.gamma)
        self._threshold = Threshold(course.epsilon, [*self._deltas], like=self.gamma)
        self._order = in_fold_order(self.plan)
        self.latest: Tensor | None = None  # the norms last taken, scaled as D was since, [sites]
        self._gamma_now = 0.0
        self.out = frozenset(self._deltas)
        self.norms: dict[str, float] = {}
        self.arrivals: list[Arrival] = []
        self.opt1_steps = self.opt2_steps = 0
        self.phase: Literal["opt1", "opt2"] = "opt1"
        self.over = self.exhausted = False
        self._hooks: list[param_group.ScaledRate | DampedStep] = []
        masks = {self._deltas[site.name]: mask(site, self._deltas[site.name]) for site in self.plan if site.moving}
        self._held = [HeldStill(optimizer, masks)] if masks else []
        if course.opt1 == 0:
            self._turn_back()

    def _embed(self, plan: Plan | None, as_plan: Mapping[str, Any]) -> tuple[Plan, dict[str, nn.Parameter]]:
        course, extended = self._course, surgery.is_extended(self._model)
        expect(
            not extended
            or (plan is None and as_plan.keys() <= {"example_inputs"}),  # further cycles extend it with these
            "the model is extended already, so it can't be planned again; leave out plan= and its arguments (example_inputs "
            "may stay)",
        )
        if not extended:
            surgery.extend(self._model, plan, **as_plan)
        try:
            sites = surgery.sites(self._model)
            deltas = {site.name: surgery.delta_of(self._model, site) for site in sites}
            Threshold(course.epsilon, [*deltas], like=next(iter(deltas.values())))
            param_group.add(
                self._optimizer, [*deltas.values()], self._model.parameters(), course.delta_lr,
                course.delta_weight_decay, [site.parameter for site in sites],
            )  # fmt: skip
        except Exception:
            if not extended:
                surgery.contract(self._model)
            raise
        return Plan(tuple(sites)), deltas

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or a pickle of a bypass that is over; copies of an optimiser lose the hooks of one under way."""
        told = "a schedule under way can't be copied or pickled: load its state_dict() into a new one for the copies"
        expect(self.over, told)
        return self.__dict__

    @property
    def deltas(self) -> tuple[nn.Parameter, ...]:
        """D, one parameter a site."""
        return tuple(self._deltas.values())

    @property
    def counts(self) -> bool:
        """Whether the coming step of opt2 is a k-th one: its loss has the penalty of all k."""
        return self.opt2_steps % self._course.every == 0

    @property
    def measures(self) -> bool:
        """Whether the constraint is looked at in the coming step of opt2: a k-th one, or the last that is planned."""
        return self.counts or self.latest is None or self.opt2_steps + 1 == self._course.opt2

    @property
    def looks(self) -> bool:
        """Whether D and what moves beside it are looked at in the coming step: in every few, and the last of a phase."""
        course, first = self._course, self.phase == "opt1"
        step, last = (self.opt1_steps + 1, course.opt1) if first else (self.opt2_steps + 1, course.opt2)
        return step >= last or step % LOOKS_EVERY == 0

    @property
    def watches(self) -> str:
        """What the coming step goes by: "norms" of the constraint, "sizes" of D and what moves beside it, or nothing, ""."""
        return "norms" if self.phase == "opt2" and self.measures else "sizes" if self.looks else ""

    @property
    def in_step(self) -> Hashable | None:
        """Where it is the same for bypasses of equal models, the coming step of opt2 scales the D of all in the same way."""
        course, kind = self._course, type(self._course.comeback)
        plain = kind.scale is Comeback.scale and kind.moves is Comeback.moves and kind.observe is Comeback.observe
        alike = course.comeback.alike() if plain and self.phase == "opt2" else None
        rate = self._rate() if alike is not None and course.comeback.uses_gamma else 0.0
        if alike is None or isinstance(rate, Tensor):
            return None
        now = self.opt2_steps, course.opt2, self.watches, self.looks
        return alike, now, self.out, self._threshold.key, rate, self._gamma_now

    def penalty(self, gamma: Tensor | None = None) -> Tensor | None:
        """What the return adds to the loss; in every k-th step only, it counts k times."""
        term = self._course.comeback.penalty(self._root, self.out, self.gamma if gamma is None else gamma)
        return term if term is None or self._course.every == 1 else self._course.every * term

    def look(self) -> Tensor:
        """What a step goes by: the norm of each site where opt2 measures them, else the largest entry of each δ; [sites]."""
        return self._norms() if self.phase == "opt2" and self.measures else self._largest()

    def step(self, loss: Tensor | float | None, seen: Seen | None = None, look: bool = False) -> None:
        """Note one step of the optimiser.

        Raises:
            NonFiniteError: the loss, a parameter or a site's D is NaN or infinite.
            SurgeryError: the model was wrapped in DDP since it was extended.
        """
        if self.opt1_steps + self.opt2_steps == 0 and dist.is_available() and dist.is_initialized():
            gradient_averaging.expect_none_since(self._model, self.deltas)
        if self.phase == "opt1":
            self._walk(loss, seen, look or self.looks)
        else:
            self._come_back(loss, seen, look or self.looks)

    def _walk(self, loss: Tensor | float | None, seen: Seen | None, looks: bool) -> None:
        self.opt1_steps += 1
        self._exchange(None, loss, seen, looks)
        if self.opt1_steps >= self._course.opt1:
            self._turn_back()

    def _largest(self) -> Tensor:
        """max |δ| of every site, [sites]: not finite where any of them is not."""
        deltas = (tensor_named(self._root, site.parameter) for site in self.plan)
        return torch.stack([torch.linalg.vector_norm(delta, math.inf).to(self.gamma) for delta in deltas])

    def _turn_back(self) -> None:
        comeback = self._course.comeback
        self.phase = "opt2"
        comeback.begin(self._root)
        if isinstance(self._course.gamma, Adaptive):
            self._course.gamma.begin()
        self._set_gamma()
        self._hooks = [param_group.ScaledRate(self._optimizer, self._rate_of)]
        self._damp()

    def _damp(self) -> None:
        """Slow down what the return moves, as it is slowed down itself."""
        for hook in self._hooks[1:]:
            hook.remove()
        del self._hooks[1:]
        if moving := self._course.comeback.moves(self._root):
            self._hooks.append(DampedStep(self._optimizer, moving, self._pace))

    def _pace(self) -> float:
        return self._course.comeback.pace(self.opt2_steps, self._course.opt2)

    def _rate_of(self, group: Mapping[str, Any]) -> float:
        only_d = all(id(parameter) in self._delta_ids for parameter in group["params"])
        return self._rate_factor * (self._pace() if only_d else 1.0)

    def _come_back(self, loss: Tensor | float | None, seen: Seen | None, looks: bool) -> None:
        course, comeback = self._course, self._course.comeback
        measured = self.measures
        still: list[Tensor] = [delta for name, delta in self._deltas.items() if name not in self.out]
        if still:
            torch._foreach_zero_(still)  # the optimiser's momentum moves even what has no gradient
        norms = seen.shrunk if seen else None
        if norms is not None:
            param_group.moved_by_hand(self._optimizer)
        else:
            norms = self.latest
            if measured or norms is None:
                there = seen.values if seen else None
                norms = self._norms(comeback.norms(self._root)) if there is None else self.only_out(there)
            norms = self._shrunk(norms, measured)
        self.latest = norms
        self.opt2_steps += 1
        last = self.opt2_steps >= course.opt2
        readings = [self._exchange(norms if measured else None, loss, seen, looks)]
        if last:
            readings.append(self.lookout.flush())
        arrived: list[str] = []
        for taken in filter(None, readings):
            self.norms = taken
            arrived = self._threshold.arrived(taken, self.out)
            if isinstance(course.gamma, Adaptive):
                course.gamma.observe(sum(taken[name] for name in self.out - frozenset(arrived)))
        on_time = comeback.ends and self.opt2_steps == course.opt2
        self._project(sorted(self.out) if on_time else arrived)
        self._set_gamma()
        if not self.out:
            if not looks:
                self._exchange(None, None, None, looks=True)
            self.lookout.flush()
            self.contract()
        elif last and course.at_budget != "continue":
            self.exhausted = True

    def _shrunk(self, norms: Tensor, measured: bool) -> Tensor:
        """Let the return scale the residuals, and give their norms after that."""
        comeback, moment = self._course.comeback, self.moment(norms)
        if measured:
            comeback.observe(self._root, moment)
        factors = self.factors(moment)
        if factors is None:
            return norms
        by_name = dict(zip(self._deltas, factors.unbind(), strict=True))
        if type(comeback).scale is Comeback.scale:
            rescale({self._deltas[name]: factor for name, factor in by_name.items() if name in self.out})
        else:
            for site in self._order:
                if site.name in self.out:
                    comeback.scale(self._root, site, by_name[site.name])
        param_group.moved_by_hand(self._optimizer)
        return self._norms() if comeback.moves(self._root) else norms * factors

    def _rate(self) -> float | Tensor:
        return param_group.current_lr(self._optimizer, next(iter(self._deltas.values()))) * self._rate_factor

    def moment(self, norms: Tensor) -> Moment:
        """Now, as the return sees it; norms may be those of several models in step, [models, sites]."""
        last = {name: self.norms[name] for name in self.out if name in self.norms}
        return Moment(norms, self.gamma, self.opt2_steps, self._course.opt2, self._rate(), last)

    def factors(self, moment: Moment) -> Tensor | None:
        """By which the return scales the residuals, of the shape of the norms; None where it leaves them."""
        factors = self._course.comeback.shrink(moment)
        # What is within ε already is folded in from where it is; to shrink it first would lose A D b_W.
        return None if factors is None else torch.where(self._threshold.within(moment.norms), 1.0, factors)

    def only_out(self, norms: Tensor) -> Tensor:
        """The norms, […, sites], with 0 for the sites that have arrived: momentum may have moved them since."""
        if len(self.out) == len(self._deltas):
            return norms
        gone = torch.tensor([name not in self.out for name in self._deltas], device=norms.device)
        return norms.masked_fill(gone, 0.0)

    def _project(self, names: list[str]) -> None:
        self.arrivals += [self._where(name) for name in names]
        if names:
            surgery.project(self._root, names)
            param_group.moved_by_hand(self._optimizer)
            self.out -= frozenset(names)
            if self.latest is not None:
                self.latest = self.only_out(self.latest)

    def _where(self, name: str) -> Arrival:
        return Arrival(name, self.opt2_steps, self.norms[name], float(torch.linalg.vector_norm(self._deltas[name])))

    @torch.no_grad()
    def measure(self) -> None:
        """Take the norms as they are now."""
        self.lookout.flush()
        taken = self._exchange(self._norms(), None, None, looks=True)
        self.norms = taken or self.lookout.flush() or {}

    def those_out(self) -> tuple[Arrival, ...]:
        """The sites that have not arrived, with the norms last taken."""
        return tuple(self._where(name) for name in self._deltas if name in self.out)

    def what_is_out(self) -> str:
        """The same in words, when opt2 has had its steps."""
        left_out = self.those_out()
        furthest = max(left_out, key=lambda arrival: arrival.norm)
        return (
            f"opt2 ended after its {self._course.opt2} steps with {len(left_out)} of {len(self.plan)} sites "
            f"still out, {furthest.site!r} furthest with a norm of {furthest.norm:.3g}"
        )

    def report(self, left_out: tuple[Arrival, ...] = (), rolled_back: str = "") -> ScheduleReport:
        """How it went until now."""
        back, steps = self._course.comeback, (self.opt1_steps, self.opt2_steps)
        notes = back.notes() if self.phase == "opt2" else ()
        return ScheduleReport(back.name, *steps, tuple(self.arrivals), left_out, rolled_back, notes)

    @torch.no_grad()
    def contract(self, drop: bool = False) -> None:
        """Restore the original architecture and take D out of the optimiser; with `drop`, D is dropped and not folded in."""
        if drop:
            for delta in self._deltas.values():
                delta.zero_()
        surgery.contract(self._model)
        param_group.remove(self._optimizer, [*self._deltas.values()])
        for hook in (*self._hooks, *self._held):
            hook.remove()
        self.out = frozenset()
        self.over = True

    def _norms(self, found: list[Tensor] | None = None) -> Tensor:
        found = constraint.residuals(self._root, self.plan.sites) if found is None else found
        return torch.stack([norm.to(self.gamma) for norm in found])

    def _set_gamma(self) -> None:
        if self._course.gamma is not None:
            self._gamma_now = float(self._course.gamma(self.opt2_steps / self._course.per_unit))
            self.gamma.fill_(self._gamma_now)

    def _exchange(
        self, norms: Tensor | None, loss: Tensor | float | None, seen: Seen | None, looks: bool
    ) -> dict[str, float] | None:
        step = self.opt1_steps if self.phase == "opt1" else self.opt2_steps
        return self.lookout.exchange(self.phase, step, norms, loss, seen, looks)

    def state_dict(self) -> dict[str, Any]:
        """What this bypass needs to go on exactly, beside the states of the model and the optimiser."""
        gamma = self._course.gamma
        return {
            "phase": self.phase,
            "opt1_steps": self.opt1_steps,
            "opt2_steps": self.opt2_steps,
            "rate_factor": self._rate_factor,
            "out": sorted(self.out),
            "norms": dict(self.norms),
            "latest": None if self.latest is None else self.latest.tolist(),
            "under_way": self.lookout.state_dict(),
            "arrivals": [asdict(arrival) for arrival in self.arrivals],
            "comeback": self._course.comeback.state_dict(),
            "gamma": gamma.state_dict() if isinstance(gamma, Adaptive) else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another bypass of the same plan stopped."""
        kept = ("opt1_steps", "opt2_steps", "rate_factor")
        self.opt1_steps, self.opt2_steps, self._rate_factor = (state[key] for key in kept)
        if state["phase"] == "opt2":
            if self.phase == "opt1":
                self._turn_back()
            self._course.comeback.load_state_dict(state["comeback"])
            if isinstance(self._course.gamma, Adaptive):
                self._course.gamma.load_state_dict(state["gamma"])
            self._set_gamma()
            self._damp()
        self.out, self.norms = frozenset(state["out"]), dict(state["norms"])
        if state["latest"] is not None:
            self.latest = self.gamma.new_tensor(state["latest"])
        self.lookout.load_state_dict(state["under_way"])
        self.arrivals = [Arrival(**entry) for entry in state["arrivals"]]
