"""A small sample of each benchmark: the commands whose results are committed still run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import comeback, coverage, digits, exactness, planning, replicas
from benchmarks.results_file import ResultsFile
from bypass_fx.settings import Settings


@pytest.fixture
def results(tmp_path: Path) -> str:
    return str(tmp_path / "results.jsonl")


@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:penalty")
def test_comeback_measures_every_return_on_both_tasks_and_goes_on(
    results: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {name: replace(task, train1=5, opt1=3, opt2=4) for name, task in comeback.TASKS.items()}
    monkeypatch.setattr(comeback, "TASKS", short)
    threads = torch.get_num_threads()
    try:
        rows = comeback.run(1, results).rows
        assert [(row["task"], row["arm"]) for row in rows] == [(task, arm) for task in short for arm in comeback.arms()]
        assert all(row["steps"] <= 4 and row["loss_at_end"] > 0 for row in rows)
        ends = [row for row in rows if "no ε" in row["arm"]]
        assert all(row["arrived"] == row["sites"] and row["steps"] == 4 for row in ends)
        file = comeback.run(1, results)
    finally:
        torch.set_num_threads(threads)
    assert len(file.rows) == len(rows)
    assert all(f"| {arm} | " in comeback.summary(file) for arm in comeback.arms())


def test_replicas_are_timed_beside_one_in_every_phase(results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (task, phases) = next(iter(replicas.CASES.items()))
    monkeypatch.setattr(replicas, "CASES", {case: (replace(task, rounds=1, steps=1), phases)})
    threads = torch.get_num_threads()
    try:
        file = replicas.run(3, results)
    finally:
        torch.set_num_threads(threads)
    assert [row["phase"] for row in file if row["device"] == "CPU"] == [*replicas.PHASES]
    assert all(row["together"] > 0 and f"| {row['ratio']:.1f} |" in replicas.summary(file) for row in file)


def test_coverage_says_what_is_found_and_that_the_model_is_unchanged() -> None:
    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2))
    row = coverage.examine(block)
    assert row["unchanged"] and row["activations"] == 2
    assert row["sites"]["strict"] == {"strict folded always": 1, "strict folded eval": 1}


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet"])
def test_exactness_holds(name: str) -> None:
    row = exactness.examine(name)
    assert row["equal_eval"] and row["equal_train"] and row["restored"]
    assert row["calls"] > 0 and not row["missed"] and not row["without_gradient"]


def test_planning_is_timed_by_the_module() -> None:
    row = planning.deep(2)
    assert row["milliseconds_per_module"] == pytest.approx(1000 * row["extend"] / row["modules"])


def test_digits_scores_both_arms_at_each_moment(results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(Settings(), train1=1, opt1=1, opt2=1, train3=1)
    monkeypatch.setattr(digits, "Settings", lambda: short)
    monkeypatch.setattr(digits.figure, "draw", lambda *_: None)
    file: ResultsFile = digits.run(1, results)
    assert [*file.rows[0]["moments"]] == ["θ*", "after opt1", "after proj", "end"]
    assert "1 seeds" in digits.summary(file)
