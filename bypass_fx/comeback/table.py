"""The returns by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bypass_fx.nearest import named

from .base import Comeback
from .homotopy import Homotopy
from .lagrangian import AugmentedLagrangian
from .penalty import Penalty
from .proximal import Proximal
from .variety import Variety

COMEBACKS: dict[str, Callable[[], Comeback]] = {
    **{kind.name: kind for kind in (Penalty, Proximal, Homotopy, AugmentedLagrangian, Variety)},
    "published": partial(Penalty, hand_over=False),
}


def resolve(comeback: str | Comeback) -> Comeback:
    """The return of that name, or the given one.

    Raises:
        BypassError: there is no return of that name.

    Example:
        >>> resolve("homotopy").name
        'homotopy'
    """
    return comeback if isinstance(comeback, Comeback) else named(comeback, COMEBACKS, "comeback")()
