"""Where both arms are, seen from θ*: step sizes, distances and angles in the extended space (Fig. 3 and 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bypass_fx.history import Geometry
from bypass_fx.passes.matrices import is_sharded

Point = dict[str, Tensor]


@torch.no_grad()
def point(model: nn.Module) -> Point:
    """A copy of the parameters, D's among them where the model is extended."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def between(start: Point, before: Point, after: nn.Module, others: tuple[Point, nn.Module] | None) -> Geometry:
    """Where a step led.

    Args:
        start: θ*; what it lacks of D is 0.
        before: the parameters before the step.
        after: the model after it.
        others: the same two of the baseline.
    """
    now = dict(after.named_parameters())
    out = _minus(now, start)
    step, distance = _norm(_minus(now, before)), _norm(out)
    cosine = _cosine(start, now)
    if others is None:
        return Geometry(step, distance, cosine)
    theirs = dict(others[1].named_parameters())
    their_out = _minus(theirs, start)
    their_step = _norm(_minus(theirs, others[0]))
    return Geometry(
        step, distance, cosine, their_step, _norm(their_out), _cosine(start, theirs), _cosine(their_out, out)
    )


def _minus(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Point:
    """left − right; a coefficient δ that one of the two lacks is 0 there."""
    shared = {name: left[name] - right[name] for name in left if name in right}
    return {**left, **{name: -value for name, value in right.items()}, **shared}


def _dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    terms = [_product(left[name], right[name]) for name in left if name in right]
    return float(torch.stack([term.to(terms[0].device) for term in terms]).sum()) if terms else 0.0


def _product(left: Tensor, right: Tensor) -> Tensor:
    product = (left.double() * right.double()).sum()
    return product.full_tensor() if is_sharded(product) else product  # type: ignore[attr-defined]


def _norm(vector: Mapping[str, Tensor]) -> float:
    return float(_dot(vector, vector) ** 0.5)


def _cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float | None:
    lengths = _norm(left) * _norm(right)
    return _dot(left, right) / lengths if lengths > 0 else None
