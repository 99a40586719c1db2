"""Casts whose dtype a forward reads from a value: of a tensor of whole numbers, it is more than rounding."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .choices import Step, pick, step_of, value_inputs
from .link import Linked
from .units import Spot, Unit

_WHOLE: set[Any] = {
    *(operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne),
    *("long", "int", "short", "bool", "argmax", "argmin", "argsort", "nonzero"),
    *(torch.argmax, torch.argmin, torch.argsort, torch.nonzero),
}


def may_round(linked: Linked, spot: Spot) -> bool:
    """Whether a cast may make whole numbers of a value, by a dtype, or another tensor's, that is not known to be real."""
    step = step_of(spot.node)
    return any(_whole(linked, spot.unit, given) for given in (*step.args[1:], *step.kwargs.values()))


def _whole(linked: Linked, unit: Unit, given: Any) -> bool:
    """Whether a dtype, or the dtype of a tensor, may be one of whole numbers; an argument of the model's is taken as real."""
    if isinstance(given, torch.dtype):
        return not given.is_floating_point
    if not isinstance(given, fx.Node):
        return False
    spot = linked.source(Spot(unit, given))
    step = step_of(spot.node)
    if step.op == "get_attr":
        tensor = linked.stored(spot)
        return tensor is None or not tensor.is_floating_point()
    if step.op in ("placeholder", "call_module") or (step.target is getattr and step.args[1] == "device"):
        return False
    if step.target is pick:
        return any(_whole(linked, spot.unit, value) for value in step.args[1:])
    if step.target in _WHOLE or not all(dtype.is_floating_point for dtype in _dtypes(step)):
        return True
    inputs = value_inputs(spot.node)
    return not inputs or _whole(linked, spot.unit, inputs[0])


def _dtypes(step: Step) -> list[torch.dtype]:
    return [each for each in (*step.args, *step.kwargs.values()) if isinstance(each, torch.dtype)]
