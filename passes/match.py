"""Which activation calls can carry a D-activation, and of which kind: a table of rules over the linked graphs.

Each rule looks at one activation call and answers with a match or with the reason why not. A mode is a row of the
table: the rules to try, in order. Adding a pattern is adding a rule and naming it in the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch.nn.functional as F

from .activation_calls import Calls
from .activations import MODULES
from .attention import value_path
from .elementwise import activation_input, end_around
from .errors import PlanError
from .infinities import may_be_infinite
from .link import Linked
from .multihead import is_multihead, is_multihead_site, value_path_inside
from .otherwise import WITHOUT, objects_in
from .outcome import SPLIT, Match, Reason
from .placed import placed_activation
from .plan import Mode, Plan, Refusal, Site
from .rewrite import remedy
from .strict import strict
from .units import ExampleInputs, Spot, Unit

Rule = Callable[[Calls, Spot], Match | Reason]


def match(linked: Linked, mode: Mode, example_inputs: ExampleInputs | None = None) -> Plan:
    """All sites and refusals of a linked model, in the order in which the model defines its modules."""
    calls = Calls(linked, example_inputs)
    entries: list[Site | Refusal] = list(unseen_refusals(linked, example_inputs is not None))
    found = {path: [*calls.of(path)] for path in linked.modules}
    names = _told_apart([(spot, name) for of_module in found.values() for name, spot, _ in of_module])
    for path, module in linked.modules.items():
        for _, spot, activation in found[path]:
            if _is_none_here(calls, spot):
                continue
            outcome = _decide(calls, spot, activation, mode)
            call = linked.graphs[spot.unit].name_of[spot.node]
            entries.append(_entry(linked, names[spot], spot.unit, call, activation, outcome))
        if is_multihead(module):
            name, outcome = f"{path}.attention".lstrip("."), value_path_inside(linked, path)
            outcome = ONLY_STRICT if mode == "relaxed" else outcome
            entries.append(_entry(linked, name, Unit(path), "attention", "attention", outcome))
    sites = tuple(entry for entry in entries if isinstance(entry, Site))
    return Plan(sites, tuple(entry for entry in entries if isinstance(entry, Refusal)), mode)


def expect_strict(linked: Linked, plan: Plan) -> None:
    """Check that the strict sites of a plan, which may be that of another model, are strict in this one, between the same
    maps.

    Raises:
        PlanError: one is not.
    """
    calls = Calls(linked, planned=True)
    for site in plan.sites:
        if site.constraint == "zero":
            continue
        outcome = _as_strict(calls, site)
        if isinstance(outcome, Reason) or not _implies(site, outcome):
            why = outcome.text if isinstance(outcome, Reason) else "its constraint or its channels are others now"
            raise PlanError(
                f"{site.name}: in this model it is no such site between {site.first} and {site.second} as in the plan "
                f"({why}); {remedy(linked)}"
            )


def _as_strict(calls: Calls, site: Site) -> Match | Reason:
    """What the strict rules say of a planned site's call."""
    linked = calls.linked
    if is_multihead_site(linked, site):
        return value_path_inside(linked, site.owner, planned=True)
    here = (site.method, site.call)
    for _, spot, activation in calls.of(site.owner):
        if (spot.unit.method, linked.graphs[spot.unit].name_of[spot.node]) == here:
            return _decide(calls, spot, activation, "strict")
    return Reason("its call is not seen")


def _implies(site: Site, found: Match) -> bool:
    """Whether a site's constraint, between the maps that it names, is enough where a match was found."""
    maps = (site.first, site.second, site.width, site.channel_dim, site.view)
    enough = site.constraint in (found.constraint, "augmented") and site.exact in (found.exact, "eval")
    return enough and maps == (found.first, found.second, found.channels.width, found.channels.axis, found.view)


def _is_none_here(calls: Calls, spot: Spot) -> bool:
    """Whether an activation is none here: steps that are one between two affine maps alone, or a step inside of such."""
    placed = placed_activation(calls.linked, spot)
    if placed is not None:
        return placed.only_between and not isinstance(strict(calls, spot), Match)
    end = end_around(spot.node)
    whole = Spot(spot.unit, end) if end is not None else None
    return whole is not None and calls.placed(whole) is not None and isinstance(strict(calls, whole), Match)


def _told_apart(named: Iterable[tuple[Spot, str]]) -> dict[Spot, str]:
    """The names of calls, each its own: a module may be called by its owner, and by a module around that by the same path.

    The innermost owner's call keeps the name.
    """
    by_name: dict[str, list[Spot]] = {}
    for spot, name in named:
        by_name.setdefault(name, []).append(spot)
    names: dict[Spot, str] = {}
    for name, (innermost, *others) in ((name, sorted(spots, key=_depth)[::-1]) for name, spots in by_name.items()):
        names[innermost] = name
        free = (new for number in itertools.count(1) if (new := f"{name}_{number}") not in by_name)
        names |= dict(zip(others, free, strict=False))
    return names


def _depth(spot: Spot) -> int:
    return len(spot.unit.path.split(".")) if spot.unit.path else 0


def _entry(
    linked: Linked, name: str, unit: Unit, call: str, activation: str, outcome: Match | Reason
) -> Site | Refusal:
    if isinstance(outcome, Reason):
        return Refusal(name, unit.path, activation, outcome.text, outcome.remedy)
    return Site(
        name, unit.path, unit.method, call, outcome.kind, outcome.constraint, activation, outcome.channels.width,
        outcome.channels.axis, _parameter_name(linked, unit, call), outcome.first, outcome.second, outcome.exact,
        outcome.view,
    )  # fmt: skip


def _decide(calls: Calls, spot: Spot, activation: str, mode: Mode) -> Match | Reason:
    """The first match of a mode's rules; where there is none, the last one's reason (the most permissive comes last)."""
    if not calls.same_activations_in_both_modes(spot.unit):
        return Reason("its owner calls other activations in eval mode than in training", "make it a module of its own")
    if calls.complex(spot):
        return COMPLEX
    reasons: list[Reason] = []
    for rule in (ATTENTION if activation == "attention" else RULES)[mode]:
        outcome = rule(calls, spot)
        if isinstance(outcome, Match):
            return outcome
        reasons.append(outcome)
    return IN_EVAL_ONLY if reasons == [IN_EVAL_ONLY, NOT_RESIDUAL] else reasons[-1]


def _parameter_name(linked: Linked, unit: Unit, call: str) -> str:
    """A name for δ on the owner that nothing else has."""
    helper = "" if unit.method == "forward" else unit.method.strip("_") + "_"
    owner, name = linked.modules[unit.path], f"delta_{helper}{call.replace('.', '_')}"
    while hasattr(owner, name):
        name += "_"
    return name


def unseen_refusals(linked: Linked, has_examples: bool) -> Iterator[Refusal]:
    """Activations, and attention, called as functions in forwards that have no graph."""
    remedy = SPLIT
    if not has_examples and not linked.failures.keys() <= {""}:
        remedy = f"pass example_inputs, or {remedy}"
    if linked.observed and any(objects_in(call) for found in linked.observed.calls.values() for call in found):
        remedy = WITHOUT
    for path, error in linked.failures.items():
        units = linked.methods(path)
        traced = {name for unit in units for name in linked.activations_in(unit)}
        calls = (node for unit in units for node in linked.graphs[unit].graph.nodes)
        traced |= {"attention" for node in calls if node.target is F.scaled_dot_product_attention}
        reasons = {activation: str(error) for activation in linked.tracing.mentions(path) if activation not in traced}
        for activation, where in linked.tracing.held_mentions(path, {unit.method for unit in units}).items():
            reasons[activation] = f"{error} (it stands in {where})"
        reasons_by_name = {name: (activation, str(error)) for name, activation in _shared(linked, path, units).items()}
        reasons_by_name |= {activation: (activation, reason) for activation, reason in reasons.items()}
        for name, (activation, reason) in reasons_by_name.items():
            yield Refusal(f"{path}.{name}".lstrip("."), path, activation, reason, remedy)


def _shared(linked: Linked, path: str, units: Iterable[Unit]) -> dict[str, str]:
    """The activation modules that a forward without a graph names, and that another module holds first."""
    called = {
        str(node.target) for unit in units for node in linked.graphs[unit].graph.nodes if node.op == "call_module"
    }
    named = linked.tracing.attribute_names(path, {unit.method for unit in units})
    children = linked.modules[path]._modules
    held = {name: child for name, child in children.items() if child is not None and name in named - called}
    return {
        name: MODULES[type(child)]
        for name, child in held.items()
        if type(child) in MODULES and f"{path}.{name}".lstrip(".") not in linked.modules
    }


IN_EVAL_ONLY = Reason(
    "it stands in no residual block, and its fold is exact in eval mode only (a BatchNorm or a dropout stands inside)",
    "mode='strict' takes it; mode='all' takes it relaxed",
)
NOT_RESIDUAL = Reason("it stands in no residual block", "mode='all' takes it")


COMPLEX = Reason("its input is complex, and D is real", "apply it to the real and the imaginary part")


def in_training(rule: Rule) -> Rule:
    """The rule, where the fold is exact in training mode too."""

    def checked(calls: Calls, spot: Spot) -> Match | Reason:
        found = rule(calls, spot)
        return IN_EVAL_ONLY if isinstance(found, Match) and found.exact != "always" else found

    return checked


def residual(calls: Calls, spot: Spot) -> Match | Reason:
    """Relaxed, D = 0 (eq. 24 of the paper), for activations of residual blocks that are no gates."""
    if calls.gates(spot):
        return Reason("a gate: its result multiplies another path", "mode='all' takes it")
    if not calls.residual(spot):
        return NOT_RESIDUAL
    return anywhere(calls, spot)


def anywhere(calls: Calls, spot: Spot) -> Match | Reason:
    """Relaxed, wherever the channels are known."""
    if not spot.node.users:
        return Reason("its result is not read: it only overwrites its input", "use the result of the call")
    z = activation_input(spot.node)
    if z is not None and may_be_infinite(calls.linked, Spot(spot.unit, z)):
        return Reason("its input may hold infinities, and 0 · ∞ is no number", "mask behind the activation")
    channels = calls.channels(spot)
    return channels if isinstance(channels, Reason) else Match("relaxed", "zero", channels)


ONLY_STRICT = Reason("attention has no relaxed bypass", "mode='auto' takes it where its values can be followed")


def only_strict(calls: Calls, spot: Spot) -> Match | Reason:
    """Attention is bypassed along its value path, or not at all."""
    return ONLY_STRICT


RULES: dict[Mode, tuple[Rule, ...]] = {
    "strict": (strict,),
    "relaxed": (residual,),
    "auto": (in_training(strict), residual),
    "all": (in_training(strict), anywhere),
}

ATTENTION: dict[Mode, tuple[Rule, ...]] = {
    "strict": (value_path,),
    "relaxed": (only_strict,),
    "auto": (in_training(value_path),),
    "all": (in_training(value_path),),
}
