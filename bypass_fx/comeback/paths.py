"""Planned paths from 1 to 0, along which a return leads what must vanish."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from bypass_fx.nearest import named
from bypass_fx.passes.errors import BypassError

# c as a function of u, the part of the way that is left, so that nothing cancels as u nears 0.
PATHS: dict[str, Callable[[float], float]] = {
    "smooth": lambda u: u**3 * (10 - 15 * u + 6 * u**2),
    "cosine": lambda u: math.sin(math.pi * u / 2) ** 2,
    "linear": lambda u: u,
}


@dataclass(frozen=True, slots=True)
class Descent:
    """A path c(t) over the last `share` of a budget of T steps: 1 before, exactly 0 at T.

    Args:
        path: with u the part that is left, "smooth", c = u³(10 − 15u + 6u²), whose last steps are the smallest, of the
            size T⁻³; "cosine", c = sin²(πu/2); or "linear", c = u.
        share: from 0 (no descent at all) to 1.

    Raises:
        BypassError: the path is unknown, or the share is none.

    Example:
        >>> halfway = Descent("linear", share=0.5)
        >>> [halfway.at(t, 8) for t in (0, 4, 6, 8)]
        [1.0, 1.0, 0.5, 0.0]
    """

    path: str = "smooth"
    share: float = 1.0

    def __post_init__(self) -> None:
        named(self.path, PATHS, "path")
        if not (isinstance(self.share, Real) and 0 <= self.share <= 1):
            told = "the share of the budget that a descent, or a landing, takes"
            raise BypassError(f"{told} is {self.share!r}; give a number from 0 to 1, such as 0.25")

    def at(self, t: int, budget: int) -> float:
        """c(t)."""
        if self.share == 0:
            return 1.0
        left = max(0, budget - t) / max(1, round(self.share * budget))
        return PATHS[self.path](min(1.0, left))

    def factor(self, t: int, budget: int) -> float:
        """c(t+1) / c(t); 1 beyond the budget, where a user has asked to go on."""
        here, there = self.at(t, budget), self.at(t + 1, budget)
        return there / here if here > 0 else 1.0
