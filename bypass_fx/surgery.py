"""The surgery as the user calls it: plan, extend, sites, project, contract."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activation import psi
from .constraint import residual
from .extension import delta_of, expect_module, is_extended, is_marked, mark, root_of, sites, unmark
from .fitting import check_fit
from .gradient_averaging import share_gradients
from .measured import MEASURED, expect_measuring, measured_plan
from .passes import fold, insert, subclass
from .passes.errors import PlanError, SurgeryError
from .passes.link import Linked
from .passes.match import expect_strict, match
from .passes.matrices import is_sharded
from .passes.plan import MODES, Mode, Plan, Site
from .passes.plan_text import no_site
from .passes.rewrite import Psi
from .passes.units import ExampleInputs
from .usual_inputs import as_inputs, usual_inputs

__all__ = [
    "ContractionReport",
    "SiteContraction",
    "contract",
    "delta_of",
    "extend",
    "fold_down",
    "is_extended",
    "plan",
    "project",
    "root_of",
    "sites",
]

Select = str | Sequence[str] | Callable[[Site], bool]
Model = TypeVar("Model", bound=nn.Module)
_WRAPPERS = (nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, slots=True)
class SiteContraction:
    """What taking one site out did: the residual it had, and ‖A D b_W‖, the step that proj took (eq. 25)."""

    name: str
    constraint: str
    residual: float
    bias_shift: float


@dataclass(frozen=True, slots=True)
class ContractionReport:
    """What `contract` did, site by site."""

    sites: tuple[SiteContraction, ...]

    @property
    def residual(self) -> float:
        """The sum of the residuals: 0 where the contraction changed no output."""
        return sum(site.residual for site in self.sites)


def plan(
    model: nn.Module,
    mode: Mode = "auto",
    select: Select | None = None,
    example_inputs: ExampleInputs | Tensor | None = None,
    **measuring: Any,
) -> Plan:
    """Find where a model can be bypassed, and why not elsewhere; the model is not changed.

    Args:
        model: any module, on any device (meta included).
        mode: "strict" (W → σ → A), "relaxed" (activations of residual blocks), "auto" (strict where the fold is exact
            in training mode too, relaxed for the remaining activations of residual blocks), or "all" (relaxed for every
            remaining one, gates included).
        select: a glob pattern over site names, several of them, or a predicate on `Site`; all sites if None. "stuck"
            takes the sites with channels that have stopped learning, and lets D move in these only (`bypass_fx.stuck`);
            "probe" the sites that gained the most in a `bypass_fx.probe`. Both need `loss_fn` and `batches`.
        example_inputs: a tuple of positional or a dict of keyword arguments of the model's forward, or its only argument,
            where optional arguments matter, or where it calls modules from code that no graph holds (`with` blocks,
            caches): the model is run on them once, in eval mode, to see how these are called. So give them as in training,
            without a cache.
        **measuring: `loss_fn`, `batches` and further arguments of `bypass_fx.stuck` or `bypass_fx.probe`, for these two.

    Raises:
        PlanError: the mode or another argument is unknown, the model can't be analysed, no channel is stuck, or no set of
            sites gained anything in the probe.
        SurgeryError: the model is extended already.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [site.name for site in plan(net)]
        ['1']
    """
    expect_measuring(select, measuring)
    if select in MEASURED:
        return measured_plan(model, select, mode=mode, example_inputs=example_inputs, **measuring)
    return linked_plan(model, mode, select, example_inputs)[1]


def linked_plan(
    model: nn.Module,
    mode: Mode = "auto",
    select: Select | None = None,
    example_inputs: ExampleInputs | Tensor | None = None,
) -> tuple[Linked, Plan]:
    """As `plan`, with the linked graphs of the model that the plan was made from.

    Raises:
        PlanError, SurgeryError: as `plan`.
    """
    model = unwrapped(model)
    _ready_parameters(model)
    example_inputs = as_inputs(example_inputs)
    linked = Linked(model, example_inputs)
    return linked, _plan(linked, mode, select, example_inputs)


def _plan(linked: Linked, mode: Mode, select: Select | None, example_inputs: ExampleInputs | None) -> Plan:
    if mode not in MODES:
        raise PlanError(f"mode={mode!r} is none of {', '.join(map(repr, MODES))}")
    found = match(linked, mode, example_inputs or usual_inputs(linked.model))
    if select is None:
        return found
    chosen = chosen_by(select)
    return Plan(tuple(site for site in found.sites if chosen(site)), found.refusals, found.mode)


def chosen_by(select: Select) -> Callable[[Site], bool]:
    """The predicate that a selection means; a PlanError where it means none."""
    if callable(select):
        return select
    patterns = [select] if isinstance(select, str) or not isinstance(select, Iterable) else [*select]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise PlanError(
            f"select={reprlib.repr(select)} is no choice of sites; give patterns of site names, or a function of a Site"
        )
    return lambda site: any(fnmatchcase(site.name, pattern) for pattern in patterns)


def extend(
    model: Model,
    plan: Plan | None = None,
    *,
    mode: Mode = "auto",
    select: Select | None = None,
    example_inputs: ExampleInputs | Tensor | None = None,
    **measuring: Any,
) -> Model:
    """Insert a D-activation ψ(z) = σ(z) + D z with D = 0 at every site (*embed*, eq. 10); the function does not change.

    The model is changed in place and returned. Its parameters stay the same objects under the same names; the new ones
    are called `delta_…`. Where anything fails, the model is as it was.

    Args:
        model: any module; for a compiled one the module inside is extended.
        plan: the sites; made here from `mode`, `select` and `example_inputs`, if None. One that was made with
            `example_inputs` needs them here too; one that was made for another model, or edited, must have its strict
            sites between the same W and A here.
        mode, select, example_inputs, **measuring: as for `plan`.

    Raises:
        PlanError: there is no site, or the plan does not fit the model.
        SurgeryError: the model is extended already, or wrapped in a way that can't take new parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> extend(net) is net
        True
        >>> [name for name, _ in net.named_parameters()]
        ['delta_1', '0.weight', '0.bias', '2.weight', '2.bias']
    """
    inner = unwrapped(model)
    parameters = _ready_parameters(inner)
    expect_measuring(select, measuring)
    example_inputs = as_inputs(example_inputs)
    if plan is None and select in MEASURED:
        plan = measured_plan(model, select, mode=mode, example_inputs=example_inputs, **measuring)
    if not (plan is None or isinstance(plan, Plan)):
        raise PlanError(f"plan is a {type(plan).__name__}; give what bypass_fx.plan(model) makes, or Plan.from_json")
    linked = Linked(inner, example_inputs)
    chosen = _plan(linked, mode, select, example_inputs) if plan is None else plan
    if not chosen.sites:
        raise PlanError(no_site(chosen, select))
    if plan is not None and select not in MEASURED and (select is not None or mode != "auto"):
        raise PlanError("mode and select say which sites to plan, and a plan is given: leave them out, or the plan")
    edits = _prepared(linked, chosen, psi)
    if plan is not None:
        expect_strict(linked, plan)
    _insert(inner, chosen, edits)
    share_gradients(model, parameters, [delta_of(inner, site) for site in chosen.sites])
    return model


def _prepared(linked: Linked, plan: Plan, psi: Psi) -> list[insert.Edit]:
    for site in plan.sites:
        check_fit(linked.model, site)
    return insert.prepare(linked, plan, psi)


def _insert(model: nn.Module, plan: Plan, edits: list[insert.Edit]) -> None:
    insert.apply(edits)
    mark(model, plan)


@contextmanager
def extended_with(
    model: Model, plan: Plan, psi: Psi, example_inputs: ExampleInputs | Tensor | None = None
) -> Iterator[None]:
    """Inside, the model runs another ψ at the sites of a plan, called as `activation.psi` is; D stays 0, and asks for no
    gradient.

    Raises:
        PlanError, SurgeryError: as `extend`.
    """
    inner = unwrapped(model)
    _ready_parameters(inner)
    _insert(inner, plan, _prepared(Linked(inner, as_inputs(example_inputs)), plan, psi))
    try:
        for site in plan.sites:
            delta_of(inner, site).requires_grad_(False)
        yield
    finally:
        _take_out(inner, sites(inner))  # there is nothing to fold, and b_A + 0 · b_W may be other bits than b_A


@torch.no_grad()
def project(model: nn.Module, names: Iterable[str]) -> None:
    """Bring single sites back (*proj*, eq. 15): fold A D b_W into b_A and set D = 0, keeping the insertion.

    Raises:
        SurgeryError: the model is not extended, or has no site of that name.
    """
    root = root_of(model)
    known = {site.name: site for site in sites(root)}
    chosen = list(names)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SurgeryError(f"no site is called {unknown[0]!r}: the sites are {', '.join(known)}")
    for site in fold.in_fold_order(known[name] for name in chosen):
        fold_down(root, site, 0.0)


@torch.no_grad()
def fold_down(model: nn.Module, site: Site, factor: Tensor | float) -> None:
    """The part 1 − c of *proj* (eq. 15): b_A ← b_A + (1 − c) A D b_W and D ← cD.

    A's output moves by at most (1 − c) ‖ADW‖‖u‖, u being W's input; where A D W = 0, by nothing.
    """
    root = root_of(model)
    delta = delta_of(root, site)
    kept = delta * factor
    fold.fold(root, site, delta - kept)
    delta.copy_(kept)


@torch.no_grad()
def contract(model: nn.Module) -> ContractionReport:
    """Take every D-activation out (*proj*): fold A D b_W into b_A, and restore the original classes and parameters.

    Where a site's constraint holds exactly, no output changes beyond rounding; elsewhere A's output moves by at most
    its residual times the norm of W's input.

    Raises:
        SurgeryError: the model is not extended, or was sharded after it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> contract(extend(net)).residual
        0.0
        >>> sorted(net.state_dict())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    root = root_of(model)
    taken = sites(root)
    _refuse_sharded_delta(root, taken)
    residuals = [residual(root, site) for site in taken]
    shifts = _fold_all(root, taken)
    report = ContractionReport(
        tuple(
            SiteContraction(site.name, site.constraint, _number(value), _number(shifts[site.name]))
            for site, value in zip(taken, residuals, strict=True)
        )
    )
    _take_out(root, taken)
    return report


def _take_out(root: nn.Module, taken: list[Site]) -> None:
    for site in taken:
        owner = root.get_submodule(site.owner)
        if subclass.is_extended_owner(owner):
            insert.restore(owner, [other.delta for other in taken if other.owner == site.owner])
    unmark(root)


def _fold_all(root: nn.Module, taken: list[Site]) -> dict[str, Tensor | None]:
    """Fold every site; where one fails, the biases are as they were."""
    names = {site.second.bias for site in taken if site.constraint == "folded" and site.second and site.second.bias}
    kept = {name: root.get_parameter(name).clone() for name in names}
    try:
        return {site.name: fold.fold(root, site, delta_of(root, site)) for site in fold.in_fold_order(taken)}
    except Exception:
        for name, value in kept.items():
            root.get_parameter(name).copy_(value)
        raise


def _number(value: Tensor | None) -> float:
    if value is None or value.is_meta or hasattr(value, "fake_mode"):
        return 0.0
    return float(torch.linalg.vector_norm(value))


def _refuse_sharded_delta(root: nn.Module, taken: Iterable[Site]) -> None:
    """FSDP2 gives up none of the parameters that it sharded; those that came after it are not its own."""
    for site in taken:
        if is_sharded(delta_of(root, site)):
            raise SurgeryError(
                f"{site.parameter} was sharded with the model, and fully_shard can't give it up again: shard the model "
                "first, then extend it"
            )


def _ready_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that is not extended; weights without a shape yet are refused."""
    modules = list(model.named_modules())
    if any(is_marked(module) for _, module in modules):
        raise SurgeryError("this model is extended already: call bypass_fx.contract(model) before extending it again")
    found: list[nn.Parameter] = []
    for path, module in modules:
        for own_name, parameter in module._parameters.items():
            if is_lazy(parameter):
                name = f"{path}.{own_name}".lstrip(".")
                raise PlanError(f"{name} has no shape yet: the model holds a lazy module; run it once, then extend it")
            found += [parameter] if parameter is not None else []
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, DataParallel's or DDP's wrapper."""
    expect_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise PlanError("a scripted module has no Python forward to rewrite: extend the model before torch.jit.script")
    inner = model.module if isinstance(model, _WRAPPERS) else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model
