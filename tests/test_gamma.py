"""Promises of γ(t)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bypass_fx.gamma import Adaptive, Exponential, Linear, PiecewiseLinear
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


@pytest.mark.parametrize("slope", [0, -1.0, math.nan, math.inf, None, "1", [1]])
def test_a_weight_that_does_not_grow_is_refused(slope: float) -> None:
    with pytest.raises(BypassError, match="positive"):
        Linear(slope)
    with pytest.raises(BypassError, match="positive"):
        PiecewiseLinear((1.0, slope), (5,))


@pytest.mark.parametrize("breaks", [(), (1, 2), (0,), (-3,), ("1",), 3])
def test_breaks_that_do_not_fit_two_slopes_are_refused(breaks: tuple[float, ...]) -> None:
    with pytest.raises(BypassError, match="give"):
        PiecewiseLinear((1.0, 2.0), breaks)


def test_breaks_must_rise() -> None:
    with pytest.raises(BypassError, match="rise"):
        PiecewiseLinear((1.0, 2.0, 3.0), (5, 5))


@given(positive, st.floats(1.001, 3), st.floats(0, 30))
def test_exponential_grows_by_its_factor_in_each_unit_of_t(start: float, growth: float, t: float) -> None:
    gamma = Exponential(start, growth)
    assert gamma(0) == start
    assert gamma(t + 1) == pytest.approx(gamma(t) * growth)


@pytest.mark.parametrize("growth", [1.0, 0.5, math.nan, math.inf, None, "2"])
def test_a_growth_that_is_none_is_refused(growth: float) -> None:
    for kind in (Exponential, Adaptive):
        with pytest.raises(BypassError, match="give a number above 1"):
            kind(1.0, growth)


def test_adaptive_grows_where_the_norm_idles_and_rests_where_it_falls() -> None:
    gamma = Adaptive(1.0, growth=3.0, fall=0.5, window=2)
    values = []
    for norm in (8.0, 7.0, 6.0, 4.0, 2.9, 2.8, 2.9):  # windows end at 8, 6 (idles), 2.9 (falls), 2.9 (idles)
        gamma.observe(norm)
        values.append(gamma(0.0))
    assert values == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 9.0]
    gamma.begin()
    assert gamma(0.0) == 1.0


@pytest.mark.parametrize("arguments", [{"start": 0.0}, {"fall": 1.0}, {"fall": 0.0}, {"fall": None}, {"window": 0}])
def test_an_adaptive_weight_out_of_range_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(BypassError, match="give"):
        Adaptive(**{"start": 1.0, **arguments})  # type: ignore[arg-type]
