"""What a picture says of one site: its formula with the actual shapes, why it is of its kind, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bypass_fx.passes.plan import Affine, Site
from bypass_fx.passes.plan_text import CONSTRAINTS

from .facts import Facts, Shape, psi_flops
from .inspection import Inspection

_FOLDS = {
    "folded": "at the end b_A ← b_A + A D b_W, and D is dropped",
    "augmented": "at the end D is dropped",
    "zero": "at the end D is dropped",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """The text on one site, in parts; `shapes` has rows of symbol, shape and meaning."""

    kind: str
    formula: tuple[str, ...]
    shapes: tuple[tuple[str, str, str], ...]
    reason: str
    cost: str


def panel(inspection: Inspection, site: Site) -> Panel:
    """The text on a site."""
    found = inspection.facts[site.name]
    attends = site.activation == "attention"
    z = "V" if attends else "z"
    sigma = "attention(Q, K, V)" if attends else f"{site.activation}(z)"
    formula = (f"ψ({z}) = {sigma} + D {z}", f"{CONSTRAINTS[site.constraint]}, {_FOLDS[site.constraint]}")
    shapes = [
        (z, _shape(found.z), _lie(site)),
        ("D", f"{site.width} × {site.width}", f"diag(δ), δ in {site.parameter}"),
        *_affine("W", site.first, found.w),
        *_affine("A", site.second, found.a),
    ]
    return Panel(site.constraint, formula, tuple(shapes), reason(inspection, site), _cost(found))


def _lie(site: Site) -> str:
    """Where the channels lie in z."""
    if site.view[-1:] == (-1,):
        return "each channel spans a run of the last axis"
    if site.view:
        return f"heads and their channels: δ as {_shape(site.view)}"
    return f"axis {site.channel_dim} holds the channels".replace("-", "−")


def reason(inspection: Inspection, site: Site) -> str:
    """Why a site is of its kind."""
    if site.kind == "relaxed":
        why = inspection.not_strict.get(site.name, "")
        if not why:
            why = "its fold would be exact in eval mode only (a BatchNorm or a dropout stands inside)"
        return f"Not strict: {why}. Relaxed: D itself must come back to 0."
    texts = {
        "folded": "A's bias can take the constant A D b_W in, so A D W = 0 is all that is asked.",
        "augmented": "A's bias can't take A D b_W in (it has none of its own, zeros at the border cut it, or others "
        "read it), so b_W counts as one more column of W.",
    }
    mode = "" if site.exact == "always" else " Exact in eval mode only: a BatchNorm or an active dropout stands inside."
    if site.activation == "attention":
        return (
            f"Each position that A reads holds values that W made at one position.{' ' + texts[site.constraint]}{mode}"
        )
    return f"W and A are affine, with only channel-wise maps between. {texts[site.constraint]}{mode}"


def _affine(symbol: str, affine: Affine | None, shape: Shape | None) -> list[tuple[str, str, str]]:
    if affine is None:
        return []
    groups = f", {affine.groups} groups" if affine.groups > 1 else ""
    norm = f", with BatchNorm {affine.norm}" if affine.norm else ""
    part = ", outputs " + ", ".join(f"{start} to {stop - 1}" for start, stop in affine.part[:2]) if affine.part else ""
    more = ", …" if len(affine.part) > 2 else ""
    return [(symbol, _shape(shape), f"{affine.name} ({affine.op}{part}{more}{groups}{norm})")]


def _shape(shape: Shape | None) -> str:
    return " × ".join(map(str, shape)) if shape is not None else "not known without an input"


def _cost(found: Facts) -> str:
    product = f"the constraint: {si(found.product_flops)}FLOP a step"
    if found.z is None:
        return f"ψ: 2 FLOP per element of z, whose size is not known; {product}"
    forward, backward = psi_flops(math.prod(found.z))
    return f"ψ: {si(forward)}FLOP forward, {si(backward)}FLOP backward for this z; {product}"


def si(value: float) -> str:
    """A number with its prefix, in three figures; a space stands before the prefix, or at the end.

    Example:
        >>> si(1234567), si(12), si(0)
        ('1.23 M', '12 ', '0 ')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}"
