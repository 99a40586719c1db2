"""The paper's claims are borne out by made-up histories that show them, and by none that doesn't."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from benchmarks.paper.claims import CLAIMS, Case, Claim, Trace, find

Rows = dict[str, dict[str, Any]]
Spoil = Callable[[Rows], None]
PHASES = ["opt1"] * 4 + ["opt2"] * 4 + ["train3"] * 4
NONE = [None] * 4


def arm(scores: list[float], accuracy: float, **columns: list[Any]) -> dict[str, Any]:
    scored = {
        str(step): {
            "train_loss": loss,
            "test_loss": 1.1 * loss,
            "train_accuracy": accuracy,
            "test_accuracy": accuracy - 0.1,
        }
        for step, loss in zip((0, 4, 8, 12), scores, strict=True)
    }
    return {"curve": {"step": [*range(1, 13)], "phase": PHASES, **columns}, "scores": scored}


def ideal() -> Rows:
    """One seed as the paper shows it, with all that was not trained."""
    baseline = arm(
        [1.0, 0.95, 0.92, 0.9], 0.8, loss=[1.0] * 12, residual=[None] * 12, size=[1.0] * 12,
        distance=[0.1 * step for step in range(12)], cosine=[0.999] * 12, relative=[None] * 12,
    )  # fmt: skip
    bypass = arm(
        [1.0, 0.6, 0.7, 0.4], 0.9, loss=[0.9, 0.8, 0.7, 0.6, 0.62, 0.7, 0.75, 0.7, 0.6, 0.5, 0.45, 0.4],
        residual=[1.0, 2.0, 3.0, 4.0, 3.0, 1.0, 0.3, 0.1, *NONE], size=[2.0] * 12,
        distance=[1.0, 2.0, 3.0, 4.0, 3.8, 3.6, 3.4, 3.2, 4.0, 5.0, 6.0, 7.0],
        cosine=[0.99, 0.97, 0.95, 0.93, 0.94, 0.95, 0.95, 0.96, 0.95, 0.94, 0.93, 0.92],
        relative=[0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1],
    )  # fmt: skip
    ends = {"θ*": 0, "after opt1": 4, "after proj": 8, "end": 12}
    bypass |= {"arrived": True, "opt2_steps": 4, "norm_at_proj": 1e-5, "jump": 1e-6, "failure": "", "ends": ends}
    rows = {"baseline": baseline | {"ends": ends}, "bypass": bypass}
    for name in ("n = 100", "γ = 0.0005t", "γ = 0.05t", "ε = 0.005", "ε = 0.05"):
        rows[name] = deepcopy(bypass)
    rows["n = 100"]["curve"]["residual"][3] = 2.5
    rows["n = 100"]["scores"]["12"]["train_loss"] = 0.5
    rows["γ = 0.05t"]["curve"]["residual"][4] = 0.1
    rows["γ = 0.05t"]["curve"]["loss"][5] = 3.0
    rows["γ = 0.0005t"]["curve"]["residual"][4:8] = [3.9, 3.8, 3.7, 3.6]
    rows["γ = 0.0005t"]["arrived"] = False
    rows["γ = 0.0005t"]["curve"]["loss"][4:8] = [0.61] * 4
    rows["ε = 0.005"] |= {"opt2_steps": 3, "jump": 1e-3}
    rows["ε = 0.05"] |= {"opt2_steps": 2, "jump": 1e-1}
    rows["theorem"] = {"least": 1.5}
    widths = [64, 128]
    rows["cost"] = {
        "widths": widths,
        "pointwise": [4 * width for width in widths],
        "matmul_flops": [0, 0],
        "products": [3, 3],
    }
    return rows


def put(name: str, path: str, *values: Any) -> Spoil:
    """Replace a number, or the part of a curve that begins at an index: "curve loss 4"."""

    def spoil(rows: Rows) -> None:
        *outer, last = path.split()
        where: Any = rows[name]
        for key in outer:
            where = where[key]
        if isinstance(where, list):
            where[int(last) : int(last) + len(values)] = values
        else:
            (where[last],) = values

    return spoil


def at(step: int, score: str, value: float) -> Spoil:
    return put("bypass", f"scores {step} {score}", value)


SPOILT: dict[str, list[Spoil]] = {
    "‖ADW‖ (Σ‖D‖ in VI-C) rises in opt1": [put("bypass", "curve residual 3", 1.0), put("bypass", "curve residual 0", 4.0)],
    "it falls below a tenth of that in opt2": [
        lambda rows: [act(rows) for act in (put("bypass", "curve residual 4", 3, 3, 3, 3), put("bypass", "norm_at_proj", 3))]
    ],
    "it comes within ε in opt2": [put("bypass", "arrived", False)],
    "the loss dips below the baseline's in opt1": [at(4, "train_loss", 0.96)],
    "it rebounds in opt2": [at(8, "train_loss", 0.6)],
    "it is still below the baseline's after proj": [at(8, "train_loss", 0.93)],
    "it ends below the baseline's": [at(12, "train_loss", 0.9)],
    "so does the test loss": [at(12, "test_loss", 1.0)],
    "the training accuracy ends above the baseline's": [at(12, "train_accuracy", 0.8)],
    "so does the test accuracy": [at(12, "test_accuracy", 0.6)],
    "steps are wider in opt1": [put("bypass", "curve size 0", 1.0, 1.0, 1.0, 1.0)],
    "steps are wider in train3": [put("bypass", "curve size 8", 1.0, 0.9, 0.9, 1.0)],
    "the distances from θ* part further in train3": [put("bypass", "curve distance 8", 2.0, 1.8, 1.5, 1.1)],
    "the distance from θ* grows in opt1 and shrinks in opt2": [
        put("bypass", "curve distance 7", 4.1), put("bypass", "curve distance 0", 4.0),
    ],
    "the baseline keeps its direction": [put("baseline", "curve cosine 9", 0.89)],
    "the bypass turns away in opt1": [put("bypass", "curve cosine 3", 0.9995)],
    "it turns back in opt2, not all the way": [
        put("bypass", "curve cosine 7", 0.92), put("bypass", "curve cosine 7", 0.9995),
    ],
    "the relative angle opens furthest": [put("bypass", "curve relative 11", 0.81), put("bypass", "curve cosine 11", 0.05)],
    "fewer n: smaller ‖ADW‖": [put("n = 100", "curve residual 3", 4.0)],
    "fewer n: less gain": [put("n = 100", "scores 12 train_loss", 0.4)],
    "faster γ: sooner back": [
        put("γ = 0.05t", "curve residual 4", 3.0, 3.0, 3.0, 3.0), put("γ = 0.0005t", "curve residual 4", 0.1),
    ],
    "faster γ: higher peak of the loss": [
        put("γ = 0.05t", "curve loss 4", *[0.6] * 4), put("γ = 0.0005t", "curve loss 5", 4.0),
    ],
    "the fastest γ peaks above the baseline": [put("γ = 0.05t", "curve loss 5", 1.0)],
    "the slowest γ stays below the baseline": [put("γ = 0.0005t", "curve loss 4", 1.0, 1.0, 1.0, 1.0)],
    "larger ε: fewer steps of opt2": [put("ε = 0.05", "opt2_steps", 4), put("ε = 0.005", "opt2_steps", 5)],
    "larger ε: larger jump at proj": [put("ε = 0.05", "jump", 1e-7), put("ε = 0.005", "jump", 1.0)],
    "train3 mends the jump": [put("ε = 0.05", "scores 12 train_loss", 0.7)],
    "∇‖ADW‖ ≠ 0 where ADW ≠ 0": [put("theorem", "least", 0.0)],
    "the extension costs O(s_W)": [put("cost", "pointwise 1", 1024), put("cost", "matmul_flops 1", 5)],
    "‖ADW‖ costs a constant number of matrix products": [put("cost", "products 1", 6)],
}  # fmt: skip


def case(rows: Rows) -> Case:
    return {name: Trace(row) for name, row in rows.items()}


def by_text(text: str) -> Claim:
    (claim,) = (claim for claim in CLAIMS if claim.text == text)
    return claim


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_is_borne_out_where_it_shows(claim: Claim) -> None:
    holds, number = claim.judge(case(ideal()))
    assert holds and math.isfinite(number)


def test_every_claim_is_spoilt_somewhere() -> None:
    assert {claim.text for claim in CLAIMS} == SPOILT.keys()


@pytest.mark.parametrize(
    ("text", "spoil"), [(text, spoil) for text, spoils in SPOILT.items() for spoil in spoils], ids=str
)
def test_a_claim_is_not_borne_out_where_it_does_not_show(text: str, spoil: Spoil) -> None:
    rows = ideal()
    spoil(rows)
    assert not by_text(text).judge(case(rows))[0]


def test_seeds_are_counted_and_one_that_broke_down_bears_nothing_out() -> None:
    good, bad, broken = ideal(), ideal(), ideal()
    at(12, "train_loss", 1.8)(bad)
    del broken["bypass"]["ends"]["end"]
    broken["bypass"]["failure"] = "opt2, step 1: the loss is nan"
    found = find(by_text("it ends below the baseline's"), "V-A", [case(rows) for rows in (good, bad, broken)])
    assert (found.borne_out, found.seeds) == (1, 3)
    assert found.number == pytest.approx((0.4 / 0.9 + 1.8 / 0.9) / 2)
