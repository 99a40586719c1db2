"""Calls that no graph shows: whether an attention may be called otherwise than it was traced."""

from __future__ import annotations

from .calls import Constant, default_call, leaves
from .link import Linked
from .outcome import Reason
from .units import Spot, Unit


def unknown_calls(linked: Linked) -> Reason:
    """The reason to refuse an attention that may be called otherwise, and what to pass where that would help."""
    text = "its calls are not seen, nor whether they leave its other arguments (a cache?) at their defaults"
    if linked.observed is None:
        return Reason(text, "pass example_inputs")
    failure = linked.observed.failure
    unreached = "they do not reach it, or only where a forward without a graph calls a helper"
    why = f"the model does not run on them ({failure})" if failure else unreached
    return Reason(f"{text}, nor do the example inputs tell: {why}", "pass other example_inputs")


def may_be_called_otherwise(linked: Linked, unit: Unit) -> bool:
    """Whether calls that are not seen, of the owner or of a caller that hands it on, may pass what is left at its default."""
    call = linked.graphs[unit].call
    own = [argument.value for _, argument in call.arguments if isinstance(argument, Constant)]
    if not (own or call.stars):
        return False
    if _is_assumed(linked, unit):
        return True
    if not unit.path or linked.is_observed(unit.path):
        return False
    callers = linked.callers.get(unit.path, [])
    return not callers or any(
        _hands_on(linked, caller) and may_be_called_otherwise(linked, caller.unit) for caller in callers
    )


def _is_assumed(linked: Linked, unit: Unit) -> bool:
    """Whether a unit is a helper method that a forward without a graph calls, traced as its defaults say."""
    signature = linked.tracing.signature(unit.path, unit.method)
    assumed = default_call(signature) if unit.method != "forward" and signature else None
    return assumed is not None and assumed.key() == linked.graphs[unit].call.key()


def _hands_on(linked: Linked, spot: Spot) -> bool:
    """Whether a call may pass on what its own forward was called with, and that was left at its default."""
    call = linked.graphs[spot.unit].call
    own = [argument.value for _, argument in call.arguments if isinstance(argument, Constant)]
    passed = leaves((spot.node.args, spot.node.kwargs))
    return call.stars is not None or any(value is each for value in passed for each in own)
