"""Extended owners: the class that an owner gets, and what it does when it is called in a way that was not seen before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .activation_calls import Calls
from .errors import SurgeryError
from .generate import Variant, generated_class, original_class
from .link import Arguments, Linked, Spot, Unit
from .match import strict
from .outcome import Match
from .plan import Site
from .rewrite import Psi, rewrite
from .trace import OwnerGraph


@dataclass(frozen=True, slots=True)
class Made:
    """What an extended class was made of: the sites with names relative to the owner, and the variants of each method."""

    sites: tuple[Site, ...]
    psi: Psi
    methods: Mapping[str, tuple[Variant, ...]]
    flags: Mapping[str, object]


def written(site: Site) -> Site:
    """The site as the owner's code knows it: with names relative to the owner, so that equal owners have equal sites."""
    prefix = f"{site.owner}." if site.owner else ""
    first, second = (
        affine and replace(affine, name="", norm=None, bias=None, weight=affine.weight.removeprefix(prefix))
        for affine in (site.first, site.second)
    )
    return replace(site, name=site.name.removeprefix(prefix), owner="", first=first, second=second)


def made_of(linked: Linked, units: list[Unit], sites: Iterable[Site], psi: Psi) -> Made:
    """Rewrite every method of an owner that holds a site."""
    sites = tuple(map(written, sites))
    methods: dict[str, tuple[Variant, ...]] = {}
    for unit in units:
        variant = _variant(linked, unit, sites, psi)
        methods[unit.method] = (*methods.get(unit.method, ()), variant)
    return Made(sites, psi, methods, _flags(linked.graphs[unit] for unit in units))


def extended_class(original: type[nn.Module], made: Made) -> type[nn.Module]:
    """The subclass that runs the rewritten methods, and rewrites a method again where it is called in another way."""
    return generated_class(original, made.methods, made.flags, partial(_rewrite_for_call, made))


def _variant(linked: Linked, unit: Unit, sites: Iterable[Site], psi: Psi) -> Variant:
    owned = linked.graphs[unit]
    here = [site for site in sites if site.method == unit.method]
    in_eval = rewrite(linked, unit, owned.in_eval, here, psi) if owned.in_eval else None
    return Variant(owned.call, owned.typed, rewrite(linked, unit, owned, here, psi), in_eval)


def _flags(graphs: Iterable[OwnerGraph]) -> dict[str, object]:
    """The plain attributes of the owner that its code was traced for, with their fingerprints."""
    reads = [read for graph in graphs for read in graph.reads]
    own = set(torch.nn.Module().__dict__)
    return {
        name: value
        for where, name, value in reads
        if not where and name not in own and value[:1] not in (("tensor",), ("module",))
    }


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rewrite_for_call(
    made: Made, module: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give the owner a class that also knows the method called in this way.

    Raises:
        SurgeryError: the method does not trace when it is called so, or a strict site would be no strict one in it.
    """
    original, extended = original_class(module), type(module)
    advice = "contract the model, and pass example_inputs that call it this way to extend"
    if method != "forward":
        raise SurgeryError(f"{original.__name__}.{method} is called with other arguments than traced: {advice}")
    module.__class__ = original
    try:
        linked = Linked(module, Arguments(args, kwargs))
        if "" in linked.failures:
            raise SurgeryError(f"called with these arguments, {linked.failures['']}: {advice}")
        unit = Unit("")
        for site in made.sites:
            node = linked.graphs[unit].names.get(site.call)
            if site.kind == "strict" and (node is None or not _as_strict(Calls(linked), Spot(unit, node), site)):
                raise SurgeryError(f"{original.__name__}.{site.call} is no strict site when called like this: {advice}")
        variants = (*made.methods[method], _variant(linked, unit, made.sites, made.psi))
        methods = {**made.methods, method: variants}
        flags = {**made.flags, **_flags([linked.graphs[unit]])}
        extended = extended_class(original, replace(made, methods=methods, flags=flags))
    finally:
        module.__class__ = extended


def _as_strict(calls: Calls, spot: Spot, site: Site) -> bool:
    """Whether the call still stands between the same W and A, with a constraint that implies the one it has."""
    found = strict(calls, spot)
    if not isinstance(found, Match) or found.first is None or found.second is None:
        return False
    assert site.first is not None and site.second is not None
    same = (found.first.weight, found.second.weight) == (site.first.weight, site.second.weight)
    return same and (found.constraint == site.constraint or site.constraint == "augmented")
