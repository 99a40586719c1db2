"""γ(t), the weight that grows while the extended model comes back (eq. 17 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bypass_fx.numeric import is_above, is_count
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
        for name, given in (("slopes", self.slopes), ("breaks", self.breaks)):
            if not isinstance(given, Iterable):
                raise BypassError(f"PiecewiseLinear got {name}={given!r}; give a sequence of numbers")
        _expect_growth("PiecewiseLinear", self.slopes)
        if len(self.slopes) != len(self.breaks) + 1:
            raise BypassError(
                f"PiecewiseLinear got {len(self.slopes)} slopes and {len(self.breaks)} breaks; "
                "give one slope more than breaks"
            )
        if not all(is_above(b, a) for a, b in zip((0.0, *self.breaks), self.breaks, strict=False)):
            raise BypassError(f"PiecewiseLinear got the breaks {tuple(self.breaks)}; give positive times that rise")
        object.__setattr__(self, "slopes", tuple(self.slopes))
        object.__setattr__(self, "breaks", tuple(self.breaks))

    def __call__(self, t: float) -> float:
        starts, ends = (0.0, *self.breaks), (*self.breaks, math.inf)
        pieces = zip(self.slopes, starts, ends, strict=True)
        return sum(slope * max(0.0, min(t, end) - start) for slope, start, end in pieces)


@dataclass(frozen=True, slots=True)
class Exponential:
    """γ(t) = start · growth^t.

    Args:
        start: γ(0), positive.
        growth: the factor by which γ grows in a unit of t, above 1.

    Raises:
        BypassError: γ would not be positive, or would not grow.

    Example:
        >>> Exponential(0.5, growth=2.0)(3)
        4.0
    """

    start: float
    growth: float

    def __post_init__(self) -> None:
        _expect_growth("Exponential", (self.start,), "start")
        _expect_factor("Exponential", self.growth)

    def __call__(self, t: float) -> float:
        return float(self.start * self.growth**t)


class Adaptive:
    """A γ that grows by a factor whenever the norm has not fallen enough, and stays where it has.

    After each `window` steps of opt2 the sum of the norms is compared with what it was a window before: where it is
    above `fall` times that, γ ← growth · γ. It never decreases, so that γ → ∞ (eq. 17) as long as the norm idles. What
    it has seen is part of the schedule's state.

    Args:
        start: γ at first, positive.
        growth: above 1.
        fall: the part of the norm that may be left after a window, below 1.
        window: steps, at least 1.

    Raises:
        BypassError: a number is out of its range.

    Example:
        >>> gamma = Adaptive(start=0.1, growth=10.0, fall=0.5, window=1)
        >>> for norm in (4.0, 3.0, 1.0):
        ...     gamma.observe(norm)
        >>> gamma(0.0)  # grew once: 3 is above half of 4, 1 below half of 3
        1.0
    """

    def __init__(self, start: float, growth: float = 2.0, fall: float = 0.9, window: int = 20) -> None:
        _expect_growth("Adaptive", (start,), "start")
        _expect_factor("Adaptive", growth)
        if not (is_above(fall, 0) and fall < 1):
            raise BypassError(f"Adaptive got fall={fall!r}; give a number between 0 and 1, such as 0.9")
        if not is_count(window, 1):
            raise BypassError(f"Adaptive got window={window!r}; give a number of steps, 1 or more")
        self._start, self._growth, self._fall, self._window = start, growth, fall, window
        self.begin()

    def __call__(self, t: float) -> float:
        return self._value

    def begin(self) -> None:
        """opt2 begins: forget an earlier one."""
        self._value = self._start
        self._count = 0
        self._before: float | None = None

    def observe(self, norm: float) -> None:
        """Take note of the sum of the norms after a step."""
        self._count += 1
        if self._before is None or self._count == self._window:
            if self._before is not None and norm > self._fall * self._before:
                self._value *= self._growth
            self._before, self._count = norm, 0

    def state_dict(self) -> dict[str, Any]:
        """What it needs to go on exactly."""
        return {"value": self._value, "count": self._count, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._value, self._count, self._before = state["value"], state["count"], state["before"]


def _expect_growth(name: str, slopes: Iterable[float], what: str = "slope") -> None:
    for slope in slopes:
        if not is_above(slope, 0):
            raise BypassError(f"{name} got the {what} {slope!r}; γ must grow, give a positive number")


def _expect_factor(name: str, growth: float) -> None:
    if not is_above(growth, 1):
        raise BypassError(f"{name} got growth={growth!r}; γ must grow, give a number above 1")
