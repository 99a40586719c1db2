"""Extended owners: the class that an owner gets, and what it does when it is called in a way that was not seen before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from .activation_calls import Calls
from .attention import value_path
from .callables import is_held
from .calls import call_of
from .errors import SurgeryError, UntraceableError
from .generate import Method, Variant, Watched, generated_class
from .link import Linked
from .multihead_source import multihead_source
from .otherwise import differences, stands_alike
from .outcome import LEAVES, Match, Reason
from .plan import Site
from .reads import OF_EVERY_MODULE, PLAIN, fingerprint
from .rewrite import Psi, runnable
from .set_attributes import names_set
from .strict import strict
from .subclass import Code, is_extended_owner, original_class, subclass
from .trace import OwnerGraph
from .units import Arguments, Spot, Unit
from .writes import any_writes


@dataclass(frozen=True, slots=True)
class Made:
    """What an extended class was made of: the sites with names relative to the owner, and the variants of each method."""

    sites: tuple[Site, ...]
    psi: Psi
    methods: Mapping[str, Method]
    flags: Mapping[str, object]
    watched: Watched


def written(site: Site) -> Site:
    """The site as the owner's code knows it: with names relative to the owner, so that equal owners have equal sites."""
    prefix = f"{site.owner}." if site.owner else ""
    first, second = (
        affine and replace(affine, name="", norm=None, bias=None, weight=affine.weight.removeprefix(prefix))
        for affine in (site.first, site.second)
    )
    return replace(site, name=site.name.removeprefix(prefix), owner="", first=first, second=second, moving=())


def made_of(linked: Linked, units: list[Unit], sites: Iterable[Site], psi: Psi) -> Made:
    """Rewrite every method of an owner that holds a site."""
    sites = tuple(map(written, sites))
    variants: dict[str, tuple[Variant, ...]] = {}
    for unit in units:
        variants[unit.method] = (*variants.get(unit.method, ()), _variant(linked, unit, sites, psi))
    module = linked.modules[units[0].path]
    methods: dict[str, Method] = {}
    for name, found in variants.items():
        signature = linked.tracing.signature(units[0].path, name)
        assert signature is not None, "what has a graph has a signature"
        methods[name] = Method(signature, is_held(module, name), found)
    held = {name: fingerprint(module.__dict__[name]) for name, method in methods.items() if method.held}
    flags = {**_flags(linked.graphs[unit] for unit in units), **held}
    return Made(sites, psi, methods, flags, _watched(module, [linked.graphs[unit] for unit in units]))


def extended_class(original: type[nn.Module], made: Made) -> type[nn.Module]:
    """The subclass that runs the rewritten methods, and rewrites a method again where it is called in another way."""
    return generated_class(original, made.methods, made.flags, made.watched, partial(_rewrite_for_call, made))


def extended_multihead(original: type[nn.Module], site: Site, psi: Psi) -> type[nn.Module]:
    """The subclass of torch's MultiheadAttention with ψ inside; it takes every call that the original takes."""
    source, scope = multihead_source(site.delta)
    made = Made((written(site),), psi, {}, {}, {})
    code = Code({"forward": False}, source, {**scope, "_psi": psi}, partial(_rewrite_for_call, made))
    return subclass(original, code)


def _variant(linked: Linked, unit: Unit, sites: Iterable[Site], psi: Psi) -> Variant:
    owned, first = linked.graphs[unit], unit.variant == 0
    here = [site for site in sites if site.method == unit.method and (first or site.call in owned.names)]
    in_eval = runnable(linked, unit, owned.in_eval, here, psi) if owned.in_eval else None
    return Variant(owned.call, owned.typed, runnable(linked, unit, owned, here, psi), in_eval)


def _flags(graphs: Iterable[OwnerGraph]) -> dict[str, object]:
    """The plain attributes of the owner that its code was traced for, with their fingerprints."""
    reads = [read for graph in graphs for read in graph.reads]
    return {
        name: value
        for where, name, value in reads
        if not where and name not in OF_EVERY_MODULE and value[:1] not in (("tensor",), ("module",))
    }


def _watched(module: nn.Module, graphs: Iterable[OwnerGraph]) -> dict[tuple[str, str], Any]:
    """The attributes of children that the code was made for: what it read, and whether they work in place."""
    found: dict[tuple[str, str], Any] = {}
    for graph in graphs:
        read = [(where, name) for where, name, value in graph.reads if where and value[0] in (*PLAIN, tuple, "object")]
        flags = [(child, "inplace") for child in graph.children if hasattr(module.get_submodule(child), "inplace")]
        for where, name in [*read, *flags]:
            found[where, name] = getattr(module.get_submodule(where), name)
    return found


def _rewrite_for_call(
    made: Made, module: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give the owner a class that also knows the method called in this way.

    Raises:
        SurgeryError: the method does not trace when it is called so, or a strict site would be no strict one in it.
    """
    original = original_class(module)
    known = made.methods[method]
    call = call_of(known.signature, args, kwargs)
    how = differences(known.variants[0].call, call) if call else ""
    advice = "call it as it was planned, or contract the model, and pass example_inputs that call it this way to extend"
    with _as_before(module):
        linked = Linked(module, Arguments(args, kwargs) if method == "forward" else None)
        try:
            unit = linked.unit_for_call(method, Arguments(args, kwargs))
        except UntraceableError as error:
            raise SurgeryError(f"called with these arguments{how}, {error}: {advice}") from error
        owned = linked.graphs[unit]
        here = [site for site in made.sites if site.method == method and site.kind == "strict"]
        lost = [site for site in here if site.call not in owned.names]
        if not lost:
            met = [site for site in made.sites if site.call in owned.names]  # but for relaxed ones, all are
            variant = _variant(linked, unit, met, made.psi)
            calls, planned = Calls(linked, planned=True), known.variants[0]
            spots = {site: Spot(unit, owned.names[site.call]) for site in here}
            lost = [site for site in here if not _as_strict(calls, spots[site], site, planned, variant)]
        if lost:
            raise SurgeryError(
                f"{original.__name__}.{lost[0].call} is no strict site when called like this{how}: {advice}"
            )
        sets = names_set(graph for each in known.variants for graph in (each.graph, each.in_eval))
        again = names_set(owned.versions) & made.flags.keys() | sets & _flags([owned]).keys()
        if again:
            raise SurgeryError(
                f"called with these arguments{how}, its forward does not leave `{min(again)}` as a call in another way "
                f"has it: {advice}"
            )
        variants = (*known.variants, variant)
        methods = {**made.methods, method: replace(known, variants=variants)}
        flags = {**made.flags, **_flags([owned])}
        watched = {**made.watched, **_watched(module, [owned])}
        extended = extended_class(original, replace(made, methods=methods, flags=flags, watched=watched))
    module.__class__ = extended


@contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Inside, the module has its original class, and so have those below, which hold the W and A of its sites."""
    extended = {each: type(each) for each in module.modules() if is_extended_owner(each)}
    try:
        for each in extended:
            each.__class__ = original_class(each)
        yield
    finally:
        for each, its_class in extended.items():
            each.__class__ = its_class


def _shows_all_uses(linked: Linked, site: Site) -> bool:
    """Whether the calls that make z and take ψ's result are all that counts: nothing is written in place, and an A whose
    bias takes the constant in is a module that is called once.
    """
    if any_writes(linked):
        return False
    if site.constraint != "folded":
        return True
    assert site.second is not None
    holder = site.second.weight.rpartition(".")[0]
    return holder in linked.callers and not linked.variants(holder) and linked.readers(site.second.weight) == 1


def _as_strict(calls: Calls, spot: Spot, site: Site, planned: Variant, variant: Variant) -> bool:
    """Whether the call still stands between the same W and A, with a constraint that implies the one it has.

    Where this graph alone does not show it (A is another owner's, or the callers know that two arguments have one size)
    what stands here must be as it was planned: z is made, and the result leaves, as it did.
    """
    found = (value_path if site.activation == "attention" else strict)(calls, spot)
    if found == LEAVES or (isinstance(found, Reason) and _shows_all_uses(calls.linked, site)):
        modes = ((each.graph, each.in_eval or each.graph) for each in (planned, variant))
        return all(stands_alike(one, other, site.delta) for one, other in zip(*modes, strict=True))
    if not isinstance(found, Match) or found.first is None or found.second is None:
        return False
    assert site.first is not None and site.second is not None
    same = (found.first.weight, found.first.part, found.second.weight, found.view) == (
        site.first.weight, site.first.part, site.second.weight, site.view
    )  # fmt: skip
    return same and (found.constraint == site.constraint or site.constraint == "augmented")
