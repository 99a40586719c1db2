"""γ(t), the weight that grows while the extended model comes back (eq. 17 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bypass_fx.passes.errors import BypassError

Gamma = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Linear:
    """γ(t) = slope · t, as in the paper's experiments (Sec. V: 0.005 t on CIFAR-10).

    Args:
        slope: growth of γ per unit of t, a step unless the schedule counts in epochs; positive.

    Raises:
        BypassError: the slope is not a positive number.

    Example:
        >>> Linear(0.005)(200)
        1.0
    """

    slope: float

    def __post_init__(self) -> None:
        _expect_growth("Linear", (self.slope,))

    def __call__(self, t: float) -> float:
        return self.slope * t


@dataclass(frozen=True, slots=True)
class PiecewiseLinear:
    """A continuous γ(t) from γ(0) = 0 whose slope changes at each break, as in the paper's Sec. VI-C.

    γ(t) = Σᵢ slopes[i] · (time that t has spent between breaks[i-1] and breaks[i]).

    Args:
        slopes: the slope of each piece, one more than there are breaks; all positive.
        breaks: the times of change, rising, in the unit of t.

    Raises:
        BypassError: the numbers of slopes and breaks don't fit, a slope isn't positive, or the breaks don't rise.

    Example:
        >>> gamma = PiecewiseLinear(slopes=(1.0, 10.0), breaks=(60,))
        >>> gamma(60), gamma(61)
        (60.0, 70.0)
    """

    slopes: Sequence[float]
    breaks: Sequence[float]

    def __post_init__(self) -> None:
        _expect_growth("PiecewiseLinear", self.slopes)
        if len(self.slopes) != len(self.breaks) + 1:
            raise BypassError(
                f"PiecewiseLinear got {len(self.slopes)} slopes and {len(self.breaks)} breaks; "
                "give one slope more than breaks"
            )
        if any(b <= a for a, b in zip((0.0, *self.breaks), self.breaks, strict=False)):
            raise BypassError(f"PiecewiseLinear got the breaks {tuple(self.breaks)}; give positive times that rise")
        object.__setattr__(self, "slopes", tuple(self.slopes))
        object.__setattr__(self, "breaks", tuple(self.breaks))

    def __call__(self, t: float) -> float:
        starts, ends = (0.0, *self.breaks), (*self.breaks, math.inf)
        pieces = zip(self.slopes, starts, ends, strict=True)
        return sum(slope * max(0.0, min(t, end) - start) for slope, start, end in pieces)


def _expect_growth(name: str, slopes: Sequence[float]) -> None:
    for slope in slopes:
        if not (math.isfinite(slope) and slope > 0):
            raise BypassError(f"{name} got the slope {slope}; γ must grow, give a positive number")
