"""Functions that are activations where they stand: a sine, or a clamp at 0, of what an affine map makes.

Elsewhere they are none: models take the sine of a position, and clamp a norm, a box or an index.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .activations import activation_input
from .affine import affine_at, norm_at
from .link import Linked
from .units import Spot
from .wires import is_wire

_WAVES: dict[Any, str] = {
    torch.sin: "sin", torch.sin_: "sin", "sin": "sin", "sin_": "sin",
    torch.cos: "cos", torch.cos_: "cos", "cos": "cos", "cos_": "cos",
}  # fmt: skip
_CLAMPS = {torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_",
           torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"}  # fmt: skip
_SCALES = {operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"}
_FARTHEST = 20  # steps back from the function


def placed_activation(linked: Linked, spot: Spot) -> str | None:
    """ "sin", "cos" or "clamp", where the spot calls it on the scaled result of an affine map; None elsewhere."""
    node = spot.node
    name = _WAVES.get(node.target) or ("clamp" if node.target in _CLAMPS and _at_zero(node) else None)
    return name if name is not None and _comes_from_affine(linked, spot) else None


def _at_zero(node: fx.Node) -> bool:
    """Whether a clamp is max(z, 0)."""
    given = dict(zip(("input", "min", "max"), node.args, strict=False)) | dict(node.kwargs)
    least = given.get("min")
    return isinstance(least, int | float) and not isinstance(least, bool) and least == 0 and given.get("max") is None


def _comes_from_affine(linked: Linked, spot: Spot) -> bool:
    value, unit = activation_input(spot.node), spot.unit
    for _ in range(_FARTHEST):
        if value is None:
            return False
        here = linked.source(Spot(unit, value))
        if affine_at(linked, here) is not None:
            return True
        inputs = here.node.all_input_nodes
        scaled = here.node.target in _SCALES and len(inputs) == 1 and len(here.node.args) == 2
        if not inputs or not (scaled or is_wire(here.node, linked.module(here)) or norm_at(linked, here)):
            return False
        value, unit = inputs[0], here.unit
    return False
