"""Which activation calls can carry a D-activation, and of which kind: a table of rules over the linked graphs.

Each rule looks at one activation call and answers with a match or with the reason why not. A mode is a row of the
table: the rules to try, in order. Adding a pattern is adding a rule and naming it in the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import fx

from .activation_calls import Calls
from .activations import activation_input
from .affine import Found, affine_at, norm_at
from .channels import Channels
from .infinities import may_be_infinite
from .link import ExampleInputs, Linked, Spot, Unit
from .outcome import Match, Reason
from .plan import Affine, Constraint, Exact, Mode, Plan, Refusal, Site
from .wires import Layout, modes_agree, still, through
from .writes import overwritten

Rule = Callable[[Calls, Spot], Match | Reason]


def match(linked: Linked, mode: Mode, example_inputs: ExampleInputs | None = None) -> Plan:
    """All sites and refusals of a linked model, in the order in which the model defines its modules."""
    calls = Calls(linked, example_inputs)
    sites: list[Site] = []
    refusals: list[Refusal] = list(unseen_refusals(linked))
    for name, spot, activation in calls.all():
        outcome = _decide(calls, spot, RULES[mode])
        unit = spot.unit
        if isinstance(outcome, Reason):
            refusals.append(Refusal(name, unit.path, activation, outcome.text, outcome.remedy))
            continue
        call, found = linked.graphs[unit].name_of[spot.node], outcome
        sites.append(
            Site(
                name, unit.path, unit.method, call, found.kind, found.constraint, activation, found.channels.width,
                found.channels.axis, _parameter_name(linked, unit, call), found.first, found.second, found.exact,
            )
        )  # fmt: skip
    return Plan(tuple(sites), tuple(refusals), mode)


def _decide(calls: Calls, spot: Spot, rules: tuple[Rule, ...]) -> Match | Reason:
    """The first match; where there is none, the last rule's reason (the most permissive rule comes last)."""
    if not calls.same_activations_in_both_modes(spot.unit):
        return Reason("its owner calls other activations in eval mode than in training", "make it a module of its own")
    reasons: list[Reason] = []
    for rule in rules:
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


def unseen_refusals(linked: Linked) -> Iterator[Refusal]:
    """Activations called as functions in forwards that have no graph."""
    for path, error in linked.failures.items():
        traced = {name for unit in linked.methods(path) for name in linked.activations_in(unit)}
        for activation in [name for name in linked.tracing.mentions(path) if name not in traced]:
            reason = Reason(
                str(error), "split the forward so that the activation is a module of its own, e.g. torch.nn.ReLU()"
            )
            yield Refusal(f"{path}.{activation}".lstrip("."), path, activation, reason.text, reason.remedy)


def strict(calls: Calls, spot: Spot) -> Match | Reason:
    """W → σ → A, both affine, only channel-wise wires between (Definition 3 of the paper, and convolutions)."""
    linked = calls.linked
    if len(linked.variants(spot.unit.path)) > 1:
        return Reason("its owner is called in several ways")
    if not spot.node.users:
        return Reason("its result is not used")
    replacing = linked.replaces_weights(spot.unit.path)
    if replacing is not None:
        return Reason(f"the forward of {replacing or 'the model'} runs it with other weights (functional_call)")
    first = _first(linked, spot)
    if isinstance(first, Reason):
        return first
    w, before = first
    second = _second(linked, spot, before)
    if isinstance(second, Reason):
        return second
    a, after, alone = second
    if a.inputs % w.outputs or (a.inputs != w.outputs and not after.flat):
        return Reason(f"A ({a.affine}) reads {a.inputs} channels, W ({w.affine}) makes {w.outputs}")
    offset = w.affine.bias is not None or w.affine.norm is not None
    carried = not after.cut and not a.pads and alone and _bias_is_free(linked, a.affine)
    constraint: Constraint = "folded" if carried or not offset else "augmented"
    exact: Exact = "eval" if w.affine.norm is not None or after.noisy else "always"
    return Match("strict", constraint, Channels(w.outputs, before.axis), w.affine, a.affine, exact)


def _first(linked: Linked, spot: Spot) -> tuple[Found, Layout] | Reason:
    """W, found by walking back from σ through wires and at most one BatchNorm."""
    node, unit, norm = activation_input(spot.node), spot.unit, None
    passed = Layout(axis=0)
    path: list[Spot] = []
    while node is not None:
        path.append(Spot(unit, node))
        here = linked.source(Spot(unit, node))
        path.append(here)
        if not modes_agree(linked.graphs[here.unit]):
            return Reason("a forward in front of it differs between training and eval mode")
        if any(overwritten(linked, spot_on_path, spot.node) for spot_on_path in path):
            return Reason("a value between W and it is overwritten in place")
        found = affine_at(linked, here)
        if found is not None:
            affine = replace(found.affine, norm=norm)
            if norm is not None and linked.modules[norm].num_features != found.outputs:
                return Reason(f"the BatchNorm {norm} normalises another axis than W's outputs")
            rank = 1 - found.axis if found.axis < -1 else None  # a batch axis, the channels, the positions
            return replace(found, affine=affine), replace(passed, axis=found.axis, rank=rank)
        batchnorm = norm_at(linked, here)
        wire = still(passed, here.node, linked.module(here))
        if batchnorm is not None and norm is None:
            norm = batchnorm
        elif wire is not None:
            passed = wire
        else:
            return Reason(f"in front of it stands {_label(linked, here)}, which is no affine map")
        inputs = here.node.all_input_nodes
        node, unit = inputs[0] if inputs else None, here.unit
    return Reason("no affine map stands in front of it")


def _second(linked: Linked, spot: Spot, layout: Layout) -> tuple[Found, Layout, bool] | Reason:
    """A, found by following every use of ψ's result through wires; all uses must end in the same map.

    The last item says whether ψ is all that A ever reads, so that A's bias may take the constant in.
    """
    todo: list[tuple[Spot, Layout]] = [(spot, layout)]
    ends: dict[str, tuple[Found, Layout, Spot]] = {}
    while todo:
        here, layout = todo.pop()
        if not modes_agree(linked.graphs[here.unit]):
            return Reason("its forward differs between training and eval mode in more than dropout and normalisation")
        for use in linked.uses(here):
            if use is None:
                return Reason("its result leaves the code that can be seen")
            found = affine_at(linked, use)
            if found is not None:
                if found.axis != layout.axis or not _reads_only_value(use, found):
                    return Reason(f"A ({found.affine}) reads another axis than the channels'")
                ends[found.affine.weight] = (found, layout, use)
                continue
            passed = through(layout, use.node, linked.module(use)) if _reads_one_value(use.node) else None
            if passed is None:
                return Reason(f"its result goes into {_label(linked, use)}, which is no affine map")
            todo.append((use, passed))
    if len(ends) != 1:
        return Reason("its result goes into several maps" if ends else "its result is not used")
    found, layout, use = next(iter(ends.values()))
    alone = (
        linked.readers(found.affine.bias) == 1
        and found.value is not None
        and _leads_back(linked, Spot(use.unit, found.value), spot)
    )
    return found, layout, alone


def _reads_only_value(use: Spot, found: Found) -> bool:
    """Whether the value enters A as its input, and not as its weight or bias."""
    return found.value is not None and sum(node.op != "get_attr" for node in use.node.all_input_nodes) == 1


def _reads_one_value(node: fx.Node) -> bool:
    """Whether a wire carries one value (sizes taken from that same value do not count)."""
    first = node.all_input_nodes[0]
    return all(
        other is first or first in other.all_input_nodes or _is_size(other, first) for other in node.all_input_nodes
    )


def _is_size(node: fx.Node, value: fx.Node) -> bool:
    """Whether the node is `value.shape[i]`."""
    return any(value in inner.all_input_nodes for inner in node.all_input_nodes)


def _leads_back(linked: Linked, value: Spot, spot: Spot) -> bool:
    """Whether the value that A reads can only come from the site."""
    for _ in range(60):
        value = linked.source(value)
        if value == spot:
            return True
        inputs = value.node.all_input_nodes
        if not inputs or value.node.op == "placeholder":
            return False
        value = Spot(value.unit, inputs[0])
    return False


def _bias_is_free(linked: Linked, affine: Affine) -> bool:
    """Whether A has a bias of its own to carry the constant: a plain, trainable parameter that nothing else holds."""
    if affine.bias is None:
        return False
    path, _, name = affine.bias.rpartition(".")
    bias = linked.modules[path]._parameters.get(name)
    return bias is not None and bias.requires_grad and linked.tracing.names.holders(bias) == 1


def _label(linked: Linked, spot: Spot) -> str:
    module = linked.module(spot)
    if module is not None:
        return f"{linked.child(*spot)} ({type(module).__name__})"
    if spot.node.op == "placeholder":
        where = spot.unit.path or "the model"
        return f"an argument of {where}"
    return str(getattr(spot.node.target, "__name__", spot.node.target))


IN_EVAL_ONLY = Reason(
    "it stands in no residual block, and its fold is exact in eval mode only (a BatchNorm or a dropout stands inside)",
    "mode='strict' takes it; mode='all' takes it relaxed",
)
NOT_RESIDUAL = Reason("it stands in no residual block", "mode='all' takes it")


def strict_in_training(calls: Calls, spot: Spot) -> Match | Reason:
    """Strict, where the fold is exact in training mode too."""
    found = strict(calls, spot)
    return IN_EVAL_ONLY if isinstance(found, Match) and found.exact != "always" else found


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


RULES: dict[Mode, tuple[Rule, ...]] = {
    "strict": (strict,),
    "relaxed": (residual,),
    "auto": (strict_in_training, residual),
    "all": (strict_in_training, anywhere),
}
