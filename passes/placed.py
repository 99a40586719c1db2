"""Steps that are an activation where they stand: a sine, a clamp at 0, or a GELU by hand, of what an affine map makes.

Elsewhere they are none: models take the sine of a position, and clamp a norm, a box or an index.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from .affine import affine_at, norm_at
from .elementwise import bends_of, ends_stretch, is_step, stays_float
from .link import Linked
from .units import Spot
from .wires import is_wire

_WAVES: set[Any] = {torch.sin, torch.sin_, "sin", "sin_", torch.cos, torch.cos_, "cos", "cos_"}
_CLAMPS: set[Any] = {
    torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_",
    torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_",
}  # fmt: skip
_FARTHEST = 20  # steps back from the first


class Placed(NamedTuple):
    """An activation made of element-wise steps: its name, and whether it is one only where it stands between affine maps."""

    name: str
    only_between: bool


def placed_activation(linked: Linked, spot: Spot) -> Placed | None:
    """The activation that the steps up to the spot are where they stand; None where they are none."""
    found = ends_stretch(spot.node) if is_step(spot.node) else None
    if found is None or not _comes_from_affine(linked, Spot(spot.unit, found.entry)):
        return None
    if not stays_float(found, spot.node):
        return None
    bends = bends_of(found)
    return Placed(_name(bends[-1]), len(bends) > 1 or not _is_known(bends[0]))


def _name(step: fx.Node) -> str:
    return str(getattr(step.target, "__name__", step.target)).removesuffix("_")


def _is_known(step: fx.Node) -> bool:
    """Whether a step is a sine, or max(z, 0)."""
    given = dict(zip(("input", "min", "max"), step.args, strict=False)) | dict(step.kwargs)
    least = given.get("min")
    at_zero = isinstance(least, int | float) and not isinstance(least, bool) and least == 0 and given.get("max") is None
    return step.target in _WAVES or (step.target in _CLAMPS and at_zero)


def _comes_from_affine(linked: Linked, value: Spot) -> bool:
    """Whether nothing but wires and a BatchNorm stand between an affine map and the value."""
    for here in linked.trail(value, _FARTHEST):
        if affine_at(linked, here) is not None:
            return True
        if not (is_wire(here.node, linked.module(here)) or norm_at(linked, here)):
            return False
    return False
