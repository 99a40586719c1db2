"""The strict rule: W → σ → A, both affine, with nothing but channel-wise wires between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import fx

from .activation_calls import Calls
from .affine import Found, affine_at, is_made_anew, norm_at
from .casts import may_round
from .channels import Channels
from .choices import pick, step_of, value_inputs
from .elementwise import activation_input
from .facts import is_fact
from .link import Linked
from .outcome import LEAVES, Match, Reason
from .plan import Affine, Constraint, Exact
from .units import Spot
from .wires import Layout, always_drops, how_modes_differ, is_cast, is_wire, modes_agree, through
from .writes import overwritten

T = TypeVar("T")


def strict(calls: Calls, spot: Spot) -> Match | Reason:
    """W → σ → A, both affine, only channel-wise wires between (Definition 3 of the paper, and convolutions)."""
    linked = calls.linked
    if len(linked.variants(spot.unit.path)) > 1:
        return Reason("its owner is called in several ways")
    if not spot.node.users:
        return Reason("its result is not used")
    if (replaced := weights_are_replaced(linked, spot.unit.path)) is not None:
        return replaced
    owned, found = linked.graphs[spot.unit], _in_one_mode(calls, spot)
    if not isinstance(found, Match) or modes_agree(owned):
        return found
    in_eval = None if any(map(always_drops, owned.versions[1].nodes)) else calls.in_eval(spot)
    if in_eval is None:
        return how_modes_differ(owned)
    with linked.in_eval(spot.unit):
        again = _in_one_mode(calls, in_eval)
    same = isinstance(again, Match) and replace(again, exact=found.exact) == found  # the dropouts of training are off
    return found if same else how_modes_differ(owned)


def _in_one_mode(calls: Calls, spot: Spot) -> Match | Reason:
    linked = calls.linked
    first = in_both_modes(linked, spot, lambda: _first(linked, spot), "a forward in front of it")
    if isinstance(first, Reason):
        return first
    w, before = first
    second = in_both_modes(linked, spot, lambda: _second(linked, spot, before))
    if isinstance(second, Reason):
        return second
    a, after, use = second
    alone = reads_nothing_else(linked, a, use, spot)
    if a.inputs % w.outputs or (a.inputs != w.outputs and not after.flat):
        return Reason(f"A ({a.affine}) reads {a.inputs} channels, W ({w.affine}) makes {w.outputs}")
    offset = w.affine.bias is not None or w.affine.norm is not None
    carried = not after.cut and not a.pads and alone and bias_is_free(linked, a.affine, calls.planned)
    constraint: Constraint = "folded" if carried or not offset else "augmented"
    exact: Exact = "eval" if w.affine.norm is not None or after.noisy else "always"
    view = (w.outputs, -1) if before.flat else ()
    return Match("strict", constraint, Channels(w.outputs, before.axis), w.affine, a.affine, exact, view)


def _first(linked: Linked, spot: Spot) -> tuple[Found, Layout] | Reason:
    """W, found by walking back from σ through wires and at most one BatchNorm, and how its outputs lie in z."""
    node, unit = activation_input(spot.node), spot.unit
    path: list[Spot] = []
    between: list[Spot] = []
    while node is not None:
        path.append(Spot(unit, node))
        here = linked.source(Spot(unit, node))
        path.append(here)
        if any(overwritten(linked, spot_on_path, spot.node) for spot_on_path in path):
            return Reason("a value between W and it is, or may be, overwritten in place")
        found = affine_at(linked, here)
        if found is not None and found.biases:
            return Reason(f"the bias of {found.affine} is computed")
        if found is not None:
            return _laid_out(linked, found, between[::-1])
        inputs = here.node.all_input_nodes
        casts = is_cast(step_of(here.node))  # `type_as` reads another value, but its dtype alone
        wire = is_wire(here.node, linked.module(here)) and inputs and (casts or _reads_one_value(here.node))
        wire = wire and not (casts and may_round(linked, here))
        if not wire and norm_at(linked, here) is None:
            return no_affine_map("in front of it stands", linked, here)
        between.append(here)
        node, unit = inputs[0], here.unit
    return Reason("no affine map stands in front of it")


def _laid_out(linked: Linked, found: Found, between: list[Spot]) -> tuple[Found, Layout] | Reason:
    """W with the BatchNorm behind it, and where its outputs lie behind the wires that follow, in their order."""
    rank = 1 - found.axis if found.axis < -1 else None  # a batch axis, the channels, the positions
    layout = Layout(found.axis, rank)
    norm: str | None = None
    for here in between:
        batchnorm = norm_at(linked, here)
        if batchnorm is None:
            passed = through(layout, here.node, linked.module(here))
            if passed is None:
                return Reason(f"between {found.affine} and it stands {label(linked, here)}, which moves the channels")
            layout = passed
        elif norm is not None:
            return Reason(f"two BatchNorms stand between {found.affine} and it")
        elif linked.modules[batchnorm].num_features != found.outputs or layout.axis != found.axis or layout.flat:
            return Reason(f"the BatchNorm {batchnorm} normalises another axis than W's outputs")
        else:
            norm = batchnorm
    return replace(found, affine=replace(found.affine, norm=norm)), layout


def in_both_modes(linked: Linked, spot: Spot, found: Callable[[], T], whose: str = "its forward") -> T | Reason:
    """What is found by following values, where each forward that they pass does the same in both modes; else why not.

    The spot's own may differ: it is matched in both.
    """
    with linked.passing() as passed:
        answer = found()
    graphs = (linked.graphs[unit] for unit in passed if unit != spot.unit)
    differs = next((how_modes_differ(owned, whose) for owned in graphs if not modes_agree(owned)), None)
    return differs or answer


def _second(linked: Linked, spot: Spot, layout: Layout) -> tuple[Found, Layout, Spot] | Reason:
    """A, found by following every use of ψ's result through wires; all uses must end in the same map.

    The last item is the spot that applies A.
    """
    todo: list[tuple[Spot, Layout]] = [(spot, layout)]
    ends: dict[str, tuple[Found, Layout, Spot]] = {}
    picks: dict[Spot, list[Layout]] = {}
    noisy = layout.noisy  # a dropout in place drops what others read
    while todo:
        here, layout = todo.pop()
        for use in linked.uses(here):
            if use is None:
                return LEAVES
            if is_fact(use.node):
                continue  # its size or its dtype alone
            if step_of(use.node).target is pick:
                picks.setdefault(use, []).append(layout)
                if len(picks[use]) == len(value_inputs(use.node)):
                    todo.append((use, layout))
                continue
            found = affine_at(linked, use)
            if found is not None:
                if found.axis != layout.axis or not reads_only_value(use, found):
                    return Reason(f"A ({found.affine}) reads another axis than the channels'")
                ends[found.affine.weight] = (found, layout, use)
                continue
            passed = _passed(linked, here, use, layout)
            if passed is None:
                return no_affine_map("its result goes into", linked, use)
            todo.append((use, passed))
            noisy = noisy or passed.noisy
    if any(len(set(layouts)) != 1 or len(layouts) != len(value_inputs(use.node)) for use, layouts in picks.items()):
        return Reason("its forward branches, and its result goes another way in one branch")
    if len(ends) != 1:
        return Reason("its result goes into several maps" if ends else "its result is not used")
    found, layout, use = next(iter(ends.values()))
    return found, replace(layout, noisy=noisy), use


def _passed(linked: Linked, value: Spot, use: Spot, layout: Layout) -> Layout | None:
    """The layout behind a wire; of those in one branch alone a cast is one."""
    step = step_of(use.node)
    if is_cast(step) and may_round(linked, use):
        return None
    if step.conditions:
        return layout if is_cast(step) and all(map(is_fact, value_inputs(use.node)[1:])) else None
    cast = is_cast(step) and linked.source(Spot(use.unit, value_inputs(use.node)[0])) == linked.source(value)
    return through(layout, use.node, linked.module(use)) if cast or _reads_one_value(use.node) else None


def reads_only_value(use: Spot, found: Found) -> bool:
    """Whether the value enters A as its input, and not as its weight or bias."""
    return found.value is not None and sum(node.op != "get_attr" for node in use.node.all_input_nodes) == 1


def _reads_one_value(node: fx.Node) -> bool:
    """Whether a wire carries one value: sizes and dtypes do not count."""
    first = node.all_input_nodes[0]
    return all(other is first or is_fact(other) for other in node.all_input_nodes)


def reads_nothing_else(linked: Linked, found: Found, use: Spot, spot: Spot) -> bool:
    """Whether A is applied once, and to what can only come from the site."""
    if linked.readers(found.affine.bias) != 1 or found.value is None:
        return False
    return spot in linked.trail(Spot(use.unit, found.value), 60)


def weights_are_replaced(linked: Linked, path: str) -> Reason | None:
    """Why there is no strict site in a module that a forward without a graph runs with other weights; None elsewhere."""
    around = linked.replaces_weights(path)
    if around is None:
        return None
    return Reason(f"the forward of {around or 'the model'} runs it with other weights (functional_call)")


def bias_is_free(linked: Linked, affine: Affine, planned: bool = False) -> bool:
    """Whether A has a bias of its own to carry the constant: a plain parameter that nothing else holds, and that is
    trainable, or was when the model was planned.
    """
    if affine.bias is None:
        return False
    path, _, name = affine.bias.rpartition(".")
    bias = linked.modules[path]._parameters.get(name)
    return bias is not None and (bias.requires_grad or planned) and linked.tracing.names.holders(bias) == 1


def no_affine_map(how: str, linked: Linked, spot: Spot) -> Reason:
    """Why what stands there is no affine map: the old forms of weight_norm and spectral_norm have a remedy."""
    module, named = linked.module(spot), f"{how} {label(linked, spot)}"
    if module is not None and is_made_anew(module):
        return Reason(
            f"{named}, whose weight a hook makes anew in every forward",
            "use the weight_norm or spectral_norm of torch.nn.utils.parametrizations",
        )
    return Reason(f"{named}, which is no affine map")


def label(linked: Linked, spot: Spot) -> str:
    """A spot's name for a reader: the module it calls, the argument or the function that it is."""
    module = linked.module(spot)
    if module is not None:
        return f"{linked.child(*spot)} ({type(module).__name__})"
    if spot.node.op == "placeholder":
        where = spot.unit.path or "the model"
        return f"an argument of {where}"
    return str(getattr(spot.node.target, "__name__", spot.node.target))
