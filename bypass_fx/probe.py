"""The paper's safeguard (Sec. VII): a few steps in the extended space, rolled back bit for bit, before a bypass is begun."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import param_group, surgery
from bypass_fx.course import expect
from bypass_fx.measured import LossFn, expect_loss, loss_of
from bypass_fx.numeric import is_count
from bypass_fx.passes.dice import unrolled
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import Mode, Plan
from bypass_fx.passes.units import ExampleInputs
from bypass_fx.snapshot import Snapshot

_ALONE = 8  # so many sites are tried one by one


@dataclass(frozen=True, slots=True)
class SiteProbe:
    """What a site promises at θ*: ‖∂L/∂δ‖, and the same over ‖∂L/∂θ‖ of all parameters."""

    name: str
    gradient: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A set of sites that was tried: the loss after the steps, and by how much a step gained more than plain training."""

    name: str
    sites: tuple[str, ...]
    loss: float
    gain: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What a probe found; nothing of it is left in the model.

    `loss` is L(θ*), `plain` the loss after as many steps of plain training, both over the probe's batches. `candidates`
    come best first.
    """

    plan: Plan
    steps: int
    loss: float
    plain: float
    gradient: float
    sites: tuple[SiteProbe, ...]
    candidates: tuple[Candidate, ...]

    @property
    def worth(self) -> bool:
        """Whether the best candidate gained more per step than plain training."""
        return self.candidates[0].gain > 0

    @property
    def best(self) -> Plan:
        """The plan with the sites of the best candidate."""
        names = set(self.candidates[0].sites)
        return Plan(tuple(site for site in self.plan if site.name in names), self.plan.refusals, self.plan.mode)


def probe(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    optimizer: Optimizer | None = None,
    steps: int | None = None,
    candidates: Mapping[str, surgery.Select] | None = None,
    mode: Mode = "auto",
    example_inputs: ExampleInputs | None = None,
) -> ProbeReport:
    """Try a few steps of opt1 with each candidate set of sites, and as many of plain training, and undo them all.

    Every trial starts from the same parameters, optimiser state, buffers and random numbers, and takes the same batches.
    All of it is bit for bit as before when the probe is over, or fails.

    Args:
        model: the model at θ*, not extended; steps are taken in the mode it is in.
        loss_fn: (model, batch) → loss, a 0-dim tensor.
        batches: what the steps are taken on, in turn, and the losses evaluated; read once, so a few are enough.
        optimizer: the one that trains the model; Adam at 1e-3 if None.
        steps: of each trial; one for each batch, if None.
        candidates: sets of sites by name, each as `select` of `plan`; if None, all sites together and, of the sites with
            the largest ‖∂L/∂δ‖, up to 8 alone.
        mode, example_inputs: as for `plan`.

    Raises:
        BypassError: an argument doesn't fit, there is no site or no batch, or a loss is no 0-dim tensor or has no gradient;
            the model is as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> x, y = torch.randn(32, 4), torch.randn(32, 1)
        >>> report = probe(net, lambda net, batch: (net(batch[0]) - batch[1]).square().mean(), [(x, y)], steps=5)
        >>> [site.name for site in report.sites], report.candidates[0].name, list(net.state_dict())
        (['1'], 'all', ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    expect_loss(loss_fn, batches)
    kept = list(batches)
    if not kept:
        raise BypassError("a probe needs at least one batch to take its steps on")
    expect(steps is None or is_count(steps, 1), f"steps is {steps!r}; give a number of steps, 1 or more")
    expect(
        candidates is None or isinstance(candidates, Mapping),
        f"candidates is {candidates!r}; give a dict of a name for each set of sites",
    )
    steps = len(kept) if steps is None else int(steps)
    plan = surgery.plan(model, mode=mode, example_inputs=example_inputs)
    if not plan.sites:
        surgery.extend(model, plan)  # raises, with the reasons
    own = optimizer or torch.optim.Adam(model.parameters(), 1e-3)
    param_group.expect_optimizer(own, model.parameters())
    trial = _Trial(model, own, loss_fn, kept, steps, example_inputs)
    with trial.undone():
        loss = trial.evaluate()
    sites, gradient = trial.gradients(plan)
    sets = _sets(plan, sites) if candidates is None else _chosen(plan, candidates)
    plain = trial.loss_after(None)
    tried = []
    for name, chosen in sets.items():
        after = trial.loss_after(chosen)
        tried.append(Candidate(name, tuple(site.name for site in chosen), after, (plain - after) / steps))
    tried.sort(
        key=lambda candidate: candidate.gain if candidate.gain == candidate.gain else -float("inf"), reverse=True
    )
    return ProbeReport(plan, steps, loss, plain, gradient, sites, tuple(tried))


class _Trial:
    """Steps from θ* that are undone."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        batches: list[Any],
        steps: int,
        example_inputs: ExampleInputs | None,
    ) -> None:
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._batches, self._steps, self._example_inputs = batches, steps, example_inputs

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever happens inside to parameters, gradients, buffers, optimiser and random numbers is undone."""
        parameters = [*self._model.parameters()]
        gradients = [parameter.grad for parameter in parameters]
        snapshot = Snapshot(self._model, self._optimizer)
        with unrolled(parameters):
            for parameter in parameters:
                parameter.grad = None  # the user's own gradients are put aside, untouched
            try:
                yield
            finally:
                snapshot.restore(self._model, self._optimizer)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient

    @contextmanager
    def extended(self, plan: Plan | None) -> Iterator[list[nn.Parameter]]:
        """The model with D at the sites of the plan, or as it is; undone."""
        with self.undone():
            if plan is None:
                yield []
                return
            surgery.extend(self._model, plan, example_inputs=self._example_inputs)
            deltas = [surgery.delta_of(self._model, site) for site in plan]
            try:
                param_group.add(self._optimizer, deltas, self._model.parameters())
                yield deltas
            finally:
                surgery.contract(self._model)
                param_group.remove(self._optimizer, deltas)

    def gradients(self, plan: Plan) -> tuple[tuple[SiteProbe, ...], float]:
        """‖∂L/∂δ‖ of every site, with D = 0 at all of them, and ‖∂L/∂θ‖ over all parameters."""
        with self.extended(plan) as deltas:
            moving = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            losses = [self._loss(batch) for batch in self._batches]
            total = torch.stack([loss.reshape(()) for loss in losses]).mean()
            if not total.requires_grad:
                raise BypassError("the loss has no gradient; have loss_fn return it undetached")
            found = torch.autograd.grad(total, moving, allow_unused=True)
            by_id = {id(p): g for p, g in zip(moving, found, strict=True) if g is not None}
        norms = [float(by_id[id(d)].norm()) if id(d) in by_id else 0.0 for d in deltas]
        own = {id(delta) for delta in deltas}
        theta = sum(float(g.square().sum()) for key, g in by_id.items() if key not in own) ** 0.5
        rows = tuple(
            SiteProbe(site.name, norm, norm / theta if theta else float("inf"))
            for site, norm in zip(plan, norms, strict=True)
        )
        return rows, theta

    def loss_after(self, plan: Plan | None) -> float:
        """The loss after the steps, in the extended space or as it is."""
        with self.extended(plan):
            for index in range(self._steps):
                self._step(self._batches[index % len(self._batches)])
            return self.evaluate()

    def _step(self, batch: Any) -> None:
        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss = self._loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        self._optimizer.step(closure)  # type: ignore[arg-type]

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the batches."""
        return sum(float(self._loss(batch)) for batch in self._batches) / len(self._batches)

    def _loss(self, batch: Any) -> Tensor:
        return loss_of(self._loss_fn, self._model, batch)


def _sets(plan: Plan, sites: tuple[SiteProbe, ...]) -> dict[str, Plan]:
    steepest = sorted(sites, key=lambda site: site.gradient, reverse=True)[:_ALONE]
    alone = [site.name for site in steepest] if len(sites) > 1 else []
    return {"all": plan, **{name: _part(plan, lambda site, name=name: site.name == name) for name in alone}}


def _chosen(plan: Plan, candidates: Mapping[str, surgery.Select]) -> dict[str, Plan]:
    made = {name: _part(plan, surgery.chosen_by(select)) for name, select in candidates.items()}
    for name, part in made.items():
        if not part.sites:
            raise BypassError(f"the candidate {name!r} names no site of this model: see bypass_fx.plan(model).sites")
    if not made:
        raise BypassError("candidates is empty; give at least one set of sites, or leave it out")
    return made


def _part(plan: Plan, keep: Callable[..., bool]) -> Plan:
    return Plan(tuple(site for site in plan if keep(site)), plan.refusals, plan.mode)
