"""Whether what a user gave is a number in its range: Python's and NumPy's count, and tensors of one element."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number, of steps say, from the least up.

    Example:
        >>> is_count(3), is_count(0, least=1), is_count(2.0), is_count("2")
        (True, False, False, False)
    """
    return isinstance(value, Integral) and int(value) >= least


def is_above(value: Any, bound: float, or_at: bool = False) -> bool:
    """Whether it is a finite number above the bound, or at it.

    Example:
        >>> is_above(1e-3, 0), is_above(0, 0), is_above(float("inf"), 0), is_above("1", 0)
        (True, False, False, False)
    """
    try:
        return math.isfinite(value) and bool(value > bound or (or_at and value == bound))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # it is no number, several, or none that a float holds
        return False
