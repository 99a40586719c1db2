"""Repeated blocks fold into one line, and only what is equal folds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bypass_fx
from bypass_fx.passes.folding import fold_names, refusal_rows, site_rows
from bypass_fx.passes.plan import Refusal


def block(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["act"], ["act"]),
        (["b.0.a", "b.1.a", "b.2.a"], ["b.{0-2}.a"]),
        (["b.0.a", "b.2.a", "b.3.a"], ["b.{0,2-3}.a"]),
        (["s.0.b.0.a", "s.0.b.1.a", "s.1.b.0.a", "s.1.b.1.a"], ["s.{0-1}.b.{0-1}.a"]),
        (["s.0.b.0.a", "s.0.b.1.a", "s.1.b.0.a"], ["s.0.b.{0-1}.a", "s.1.b.0.a"]),
        (["layer1.0", "layer2.0"], ["layer1.0", "layer2.0"]),
    ],
)
def test_names_fold_where_their_numbers_make_a_grid(names: list[str], folded: list[str]) -> None:
    assert fold_names(names) == folded


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_folded_names_stand_for_exactly_the_names_that_were_there(numbers: set[tuple[int, int]]) -> None:
    names = [f"s.{a}.b.{b}.act" for a, b in sorted(numbers)]
    unfolded = [name for folded in fold_names(names) for name in _unfolded(folded)]
    assert sorted(unfolded) == sorted(names)


def _unfolded(folded: str) -> list[str]:
    head, brace, rest = folded.partition("{")
    if not brace:
        return [folded]
    spread, _, tail = rest.partition("}")
    numbers: list[int] = []
    for part in spread.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [name for number in numbers for name in _unfolded(f"{head}{number}{tail}")]


def test_sites_fold_with_their_w_and_a_seen_from_the_owner() -> None:
    plan = bypass_fx.plan(nn.Sequential(*(block() for _ in range(3))))
    (row,) = site_rows(plan.sites)
    assert (row.name, len(row.sites), row.first, row.second) == ("{0-2}.1", 3, ".0", ".2")


@pytest.mark.parametrize(
    "other",
    [lambda: block(6), lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))],
    ids=["another width", "another activation"],
)
def test_sites_that_differ_do_not_fold(other: Callable[[], nn.Module]) -> None:
    plan = bypass_fx.plan(nn.Sequential(block(), block(), other()))
    assert [row.name for row in site_rows(plan.sites)] == ["{0-1}.1", "2.1"]


def test_reasons_that_differ_in_the_number_of_a_block_are_one() -> None:
    refusals = [Refusal(f"b.{i}.act", f"b.{i}", "relu", f"its result goes into b.{i}.pool (MaxPool2d)") for i in (0, 1)]
    other = Refusal("head.act", "head", "relu", "it stands in no residual block", "mode='all' takes it")
    first, second = refusal_rows([other, *refusals])
    assert (first.count, first.reason, first.names) == (
        2,
        "its result goes into b.*.pool (MaxPool2d)",
        ("b.{0-1}.act",),
    )
    assert (second.count, second.remedy) == (1, "mode='all' takes it")
