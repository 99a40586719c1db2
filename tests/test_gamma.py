"""Promises of γ(t)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bypass_fx.gamma import Linear, PiecewiseLinear
from bypass_fx.passes.errors import BypassError

positive = st.floats(1e-6, 1e3)


@given(positive, st.floats(0, 1e6))
def test_linear_is_slope_times_t(slope: float, t: float) -> None:
    assert Linear(slope)(t) == slope * t


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=5), positive)
def test_piecewise_linear_starts_at_zero_is_continuous_and_has_each_slope_on_its_piece(
    pieces: list[tuple[float, float]], last: float
) -> None:
    slopes = (*(slope for slope, _ in pieces), last)
    breaks = [sum(length for _, length in pieces[: i + 1]) for i in range(len(pieces))]
    gamma = PiecewiseLinear(slopes, breaks)
    assert gamma(0) == 0
    for start, end, slope in zip((0.0, *breaks), (*breaks, breaks[-1] + 1.0), slopes, strict=True):
        assert gamma(end) - gamma(start) == pytest.approx(slope * (end - start), rel=1e-6, abs=1e-6 * gamma(end))
        middle = (start + end) / 2
        assert gamma(middle) == pytest.approx((gamma(start) + gamma(end)) / 2)


def test_the_papers_resnet_schedule_is_one_line() -> None:
    steps_per_epoch = 391
    gamma = PiecewiseLinear(slopes=(3e-6, 3e-5), breaks=(60 * steps_per_epoch,))
    assert gamma(60 * 391) == pytest.approx(3e-6 * 60 * 391)
    assert gamma(61 * 391) - gamma(60 * 391) == pytest.approx(3e-5 * 391)


def test_equal_weights_are_equal_and_hashable() -> None:
    assert {Linear(0.6), Linear(0.6)} == {Linear(0.6)}
    assert hash(PiecewiseLinear([1, 2], [3])) == hash(PiecewiseLinear((1, 2), (3,)))


@pytest.mark.parametrize("slope", [0, -1.0, math.nan, math.inf])
def test_a_weight_that_does_not_grow_is_refused(slope: float) -> None:
    with pytest.raises(BypassError, match="positive"):
        Linear(slope)
    with pytest.raises(BypassError, match="positive"):
        PiecewiseLinear((1.0, slope), (5,))


@pytest.mark.parametrize("breaks", [(), (1, 2), (0,), (-3,)])
def test_breaks_that_do_not_fit_two_slopes_are_refused(breaks: tuple[float, ...]) -> None:
    with pytest.raises(BypassError, match="give"):
        PiecewiseLinear((1.0, 2.0), breaks)


def test_breaks_must_rise() -> None:
    with pytest.raises(BypassError, match="rise"):
        PiecewiseLinear((1.0, 2.0, 3.0), (5, 5))
