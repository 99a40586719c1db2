"""Insertion: ψ is written into the owner's graph, and the owner's class is swapped for a subclass that runs it.

Nothing of a model is touched before the code of every owner is generated.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .elementwise import activation_input
from .errors import PlanError
from .extended import extended_class, extended_multihead, made_of, written
from .link import Linked
from .matrices import tensor_named
from .multihead import is_multihead_site
from .plan import Plan, Site
from .rewrite import Psi, remedy
from .subclass import is_extended_owner, original_class
from .units import Spot, Unit
from .unseen import may_be_called_otherwise
from .within import runs_within
from .writes import acts_in_place, overwritten_beside


@dataclass(frozen=True, slots=True)
class Edit:
    """What will happen to one owner: its new class, and the δ it gets for each site."""

    owner: nn.Module
    extended: type[nn.Module]
    deltas: tuple[tuple[str, nn.Parameter], ...]
    hooked: bool = False


def prepare(linked: Linked, plan: Plan, psi: Psi) -> list[Edit]:
    """Generate the code for every owner of the plan; the model is not touched.

    Raises:
        PlanError: a site of the plan does not exist in this model, or two are the same; the message names it.
    """
    _expect_each_once(plan)
    owners: dict[str, list[Site]] = {}
    for site in plan.sites:
        owners.setdefault(site.owner, []).append(site)
    edits: list[Edit] = []
    shared: dict[Hashable, type[nn.Module]] = {}
    for path, sites in owners.items():
        if is_multihead_site(linked, sites[0]):
            edits.append(_multihead(linked, sites[0], psi))
            continue
        units = list(dict.fromkeys(unit for site in sites for unit in _units(linked, site)))
        _expect_calls_known(linked, units, sites)
        module = linked.modules[path]
        key = _same_code(linked, module, units, sites)
        if key not in shared:
            made = made_of(linked, units, sites, psi)
            shared[key] = extended_class(type(module), made)
        deltas = tuple((site.delta, _new_delta(linked, site)) for site in sites)
        edits.append(Edit(module, shared[key], deltas, hooked=any(site.method != "forward" for site in sites)))
    return edits


def _expect_each_once(plan: Plan) -> None:
    seen: set[tuple[str, ...]] = set()
    for site in plan.sites:
        keys = {("name", site.name), ("call", site.owner, site.method, site.call), ("delta", site.owner, site.delta)}
        if keys & seen:
            raise PlanError(f"{site.name}: two sites of the plan have this name, call or {site.delta}; leave one out")
        seen |= keys


def _multihead(linked: Linked, site: Site, psi: Psi) -> Edit:
    module = linked.modules[site.owner]
    extended = extended_multihead(type(module), site, psi)
    return Edit(module, extended, ((site.delta, _new_delta(linked, site)),), hooked=True)


def _units(linked: Linked, site: Site) -> list[Unit]:
    """The units in which the site is written: all variants of its owner's forward, or a helper method."""
    if site.owner in linked.modules:
        if site.method != "forward":
            units = [unit for unit in linked.methods(site.owner) if unit.method == site.method]
        else:
            units = linked.variants(site.owner) or linked.own_unit(site.owner)
        if units:
            return units
    raise PlanError(
        f"{site.name}: the model has no module {site.owner!r} with a {site.method} that traces; {remedy(linked)}"
    )


def _expect_calls_known(linked: Linked, units: list[Unit], sites: list[Site]) -> None:
    """An attention with calls that are not seen is no site: the plan was made where they were."""
    attention = next((site for site in sites if site.activation == "attention"), None)
    if attention is not None and any(may_be_called_otherwise(linked, unit) for unit in units):
        raise PlanError(f"{attention.name}: how the model calls {attention.owner} is not seen; {remedy(linked)}")


def apply(edits: Iterable[Edit]) -> None:
    """Swap the classes and register the parameters; where one edit fails, those before it are undone."""
    done: list[Edit] = []
    try:
        for edit in edits:
            done.append(edit)
            _apply(edit)
    except Exception:
        for edit in done:
            if is_extended_owner(edit.owner):
                restore(edit.owner, [])
            for name, delta in edit.deltas:
                if edit.owner._parameters.get(name) is delta:
                    del edit.owner._parameters[name]
        raise


def _apply(edit: Edit) -> None:
    for name, delta in edit.deltas:
        try:
            edit.owner.register_parameter(name, delta)
        except KeyError as error:
            raise PlanError(f"{type(edit.owner).__name__} has a {name} already; plan this model anew") from error
    edit.owner.__class__ = edit.extended
    if edit.hooked:
        edit.owner.register_forward_pre_hook(keep_off_fast_paths)


def keep_off_fast_paths(module: nn.Module, args: object) -> None:
    """A forward pre-hook that does nothing: torch's fused inference paths skip a module's methods unless it has hooks."""


def restore(owner: nn.Module, deltas: Iterable[str]) -> None:
    """Give an owner its original class back and drop its δ."""
    owner.__class__ = original_class(owner)
    for key, hook in list(owner._forward_pre_hooks.items()):
        if hook is keep_off_fast_paths:
            del owner._forward_pre_hooks[key]
    for name in deltas:
        owner._parameters.pop(name, None)


def _new_delta(linked: Linked, site: Site) -> nn.Parameter:
    """δ = 0 on the owner's device; float32 where the model is in half precision, whose steps are too small for δ."""
    near: Iterable[Tensor] = [tensor_named(linked.model, site.first.weight)] if site.first else []
    near = itertools.chain(near, linked.modules[site.owner].parameters(), linked.model.parameters())
    like = next((parameter for parameter in near if parameter.is_floating_point()), torch.empty(0))
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return nn.Parameter(torch.zeros(site.width, dtype=dtype, device=like.device))


def _same_code(linked: Linked, module: nn.Module, units: list[Unit], sites: list[Site]) -> Hashable:
    """What decides the code of an owner: owners of one model that agree in it share their class."""
    ways: list[tuple[bool, bool, bool]] = []
    for unit in units:
        names = linked.graphs[unit].names
        calls = [names[site.call] for site in sites if site.method == unit.method and site.call in names]
        spots = [Spot(unit, node) for node in calls if activation_input(node) is not None]
        ways += [(acts_in_place(linked, s), overwritten_beside(linked, s), runs_within(linked, *s)) for s in spots]
    graphs = tuple(linked.graphs[unit] for unit in units)
    return type(module), graphs, tuple(map(written, sites)), tuple(ways)
