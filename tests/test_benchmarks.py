"""A small sample of each benchmark: the commands whose results are committed still run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import (
    beside,
    comeback,
    coverage,
    digits,
    exactness,
    growth,
    overhead,
    paper,
    penalty_cost,
    planning,
    replicas,
)
from benchmarks.paper import experiment, report, saved, theory, walk
from benchmarks.results_file import ResultsFile
from benchmarks.stopwatch import peak_memory
from bypass_fx import data
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


@pytest.mark.filterwarnings(
    "ignore:.*TF32", "ignore::FutureWarning", "ignore::UserWarning"
)  # of peft and of torch-pruning
def test_overhead_measures_each_of_its_parts_and_goes_on(results: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="pip install -e .[bench]")
    pytest.importorskip("torch_pruning", reason="pip install -e .[bench]")
    small = overhead.Workload("2c2d", (4, 32), (4, 32))
    for module in (overhead, beside):
        monkeypatch.setattr(module, "WORKLOADS", {"2c2d": small})
    monkeypatch.setattr(overhead, "REPEATS", 2)
    monkeypatch.setattr(overhead, "BACKEND", "aot_eager")  # the compiler itself takes a minute
    monkeypatch.setattr(penalty_cost, "WIDTHS", (8, 2**18))
    monkeypatch.setattr(penalty_cost, "SITES", (1,))
    monkeypatch.setattr(growth, "SERIES", {"sites": (growth.Size(16, 2, 1, 1), growth.Size(16, 2, 1, 2))})
    monkeypatch.setattr(growth, "EXTENDED_DEPTHS", (1,))
    file = overhead.run("", results)
    rows = {row["name"]: row for row in file}
    eager, compiled = rows["step:2c2d:eager"], rows["step:2c2d:compiled"]
    assert {*eager["ratios"]} == {*eager["memory"]} == {"opt1", *overhead.RETURNS}
    assert min(*eager["ratios"].values(), *compiled["ratios"].values()) > 0.1
    kept = rows.get("step:2c2d:eager, memory kept", eager)  # on Linux alone
    assert kept["ratios"].keys() == eager["ratios"].keys() and kept["faults"].keys() == {"base", "opt1"}
    assert 1 <= eager["memory"]["opt1"] < 1.5 and compiled["compile"]["ratio"] > 0
    assert rows["penalty:8×1"]["ours"] > rows["penalty:8×1"]["floor"] > 0
    assert rows["penalty:262144×1"]["skipped"] == "memory"
    assert len(growth.points(file, "sites")) == 2 and file.path.with_name("results-sites.png").stat().st_size > 1000
    assert rows["beside:2c2d"]["ratios"].keys() == {"opt1", "lora"}
    text = overhead.summary(overhead.run("", results))
    assert len(overhead.run("", results).rows) == len(rows)
    assert "Not measured on this machine: GPU." in text and "not measured: memory" in text


def test_the_peak_of_memory_is_what_is_held_at_once() -> None:
    def one_after_another() -> None:
        for _ in range(3):
            torch.empty(2**20)

    def at_once() -> list[Any]:
        return [torch.empty(2**20) for _ in range(3)]

    assert 3 * peak_memory(one_after_another) == peak_memory(at_once) == 3 * 4 * 2**20


SMALL = {
    "V-A": {"train1": 6, "opt1": 3, "opt2": 3, "train3": 3, "seeds": 2},
    "V-B": {"model": "mlp", "shorten": 200, "seeds": 2},
    "VI-A": {"model": "mlp", "shorten": 200, "seeds": 2},
    "VI-B": {"model": "mlp", "shorten": 200, "seeds": 1},
    "VI-C": {"model": "timm:test_resnet", "shorten": 800, "seeds": 1},
}


@pytest.fixture
def small_paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(full: bool = False, cifar10: str = "") -> dict[str, experiment.Experiment]:
        return {name: replace(each, **SMALL[name]) for name, each in experiment.load(full, cifar10).items()}

    def first(examples: data.Examples) -> data.Examples:
        assert isinstance(examples, TensorDataset)
        return TensorDataset(*(part[:256] for part in examples.tensors))

    def few(name: str) -> data.Data:
        whole = data.load(name)
        return replace(whole, train=first(whole.train), test=first(whole.test))

    for module in (paper, report):
        monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(experiment.Experiment, "examples", lambda self: few(self.data))
    monkeypatch.setattr(report.figure, "save", lambda picture, path: path.touch())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(saved, "RUNS", tmp_path / "runs")


def test_paper_runs_every_experiment_goes_on_and_judges_every_claim(
    results: str, small_paper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((paper, "THEOREM_SEEDS"), (theory, "DRAWS"), (theory, "ROUNDS")):
        monkeypatch.setattr(module, name, 1)
    rows = paper.run(results=results).rows
    arms = {(row["experiment"], row["arm"], row["seed"]) for row in rows if "arm" in row}
    assert len(arms) == len(rows) - 2 == 2 * 2 + 2 * 2 + 2 * 5 + 2 + 2
    file = paper.run(results=results)
    assert len(file.rows) == len(rows)
    table = paper.summary(file)
    assert all(f"| {claim.text} | " in table for claim in report.CLAIMS)
    assert "paper V-B --full`" in table and "paper V-B`" not in table
    assert "Stand-in data" in table and "Shortened" in table
    assert len([*tmp_path.glob("*.png")]) == 6


def test_paper_walks_with_equal_arms_until_opt1_and_scores_both_where_one_ends_a_phase(
    results: str, small_paper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "SCORES", 1)
    rows = paper.run("VI-A", results=results).rows
    of = {row["arm"]: row for row in rows if row["seed"] == 1}
    reference, steeper, baseline = (of[name] for name in ("bypass", "γ = 0.05t", "baseline"))
    opt1 = reference["ends"]["after opt1"] - reference["ends"]["θ*"]
    assert steeper["curve"]["loss"][:opt1] == reference["curve"]["loss"][:opt1]
    assert steeper["curve"]["loss"] != reference["curve"]["loss"]
    assert {str(step) for step in reference["ends"].values()} <= baseline["scores"].keys()
    assert reference["scores"][str(reference["ends"]["θ*"])] == baseline["scores"][str(baseline["ends"]["θ*"])]
    norms = reference["curve"]["residual"]
    assert all(norm > 0 for norm in norms[:opt1]) and norms[-1] is None


def test_paper_records_the_beginning_of_every_phase_however_short(
    results: str, small_paper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "RECORDS", 3)
    rows = paper.run("VI-B", results=results).rows
    of = {(row["arm"], row["seed"]): row for row in rows}
    for (arm, seed), row in of.items():
        if arm == "bypass":
            ends, curve, beside = row["ends"], row["curve"], of["baseline", seed]["curve"]
            for phase, before in (("opt1", "θ*"), ("opt2", "after opt1"), ("train3", "after proj")):
                steps = [step for step, at in zip(curve["step"], curve["phase"], strict=True) if at == phase]
                assert steps[0] == ends[before] + 1 and set(steps) <= {*beside["step"]}


def test_paper_adds_only_what_a_killed_run_had_not_saved(results: str, small_paper: None) -> None:
    rows = paper.run("VI-B", results=results).rows
    path = Path(results)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    again = paper.run("VI-B", results=results).rows
    assert [row["arm"] for row in again] == [row["arm"] for row in rows]


@pytest.mark.parametrize(("name", "losses"), [("V-A", 4), ("V-B", 9), ("VI-C", 4)])
def test_paper_goes_on_where_it_was_stopped(
    name: str, losses: int, tmp_path: Path, small_paper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(called: str) -> list[dict[str, Any]]:
        rows = paper.run(name, results=str(tmp_path / called)).rows
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    whole = run("whole")
    shutil.rmtree(tmp_path / "runs")  # θ* of above
    monkeypatch.setattr(saved, "EVERY", 0.0)
    plain, left = walk.Stage.loss, losses

    def loss(stage: walk.Stage, model: nn.Module, batch: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            left = losses
            raise KeyboardInterrupt
        return plain(stage, model, batch)

    monkeypatch.setattr(walk.Stage, "loss", loss)
    stops = 0
    while True:
        try:
            rows = run("resumed")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 2 and rows == whole
    assert not [*(tmp_path / "runs").glob("*/seeds*")]


def test_paper_goes_on_with_the_same_seeds_only(small_paper: None) -> None:
    one = experiment.load()["V-B"]
    kept = saved.Saved(one, "seeds", [0, 2, 3])
    kept.save(5, {"loss": 0.5})
    assert kept.load() == (5, {"loss": 0.5})
    assert saved.Saved(one, "seeds", [0, 1, 3]).load() is None
    assert saved.Saved(replace(one, lr=0.5), "seeds", [0, 2, 3]).load() is None


def test_paper_takes_no_more_seeds_of_the_experiment_that_another_varies(results: str, small_paper: None) -> None:
    rows = paper.run("VI-A", results=results).rows
    assert {(row["experiment"], row["seed"]) for row in rows} == {
        (name, seed) for name in ("V-B", "VI-A") for seed in (0, 1)
    }


def test_paper_keeps_the_papers_numbers_at_full_length_and_takes_cifar10(tmp_path: Path) -> None:
    experiments = experiment.load(full=True, cifar10=str(tmp_path))
    shown = {name: (each.lr, each.decay, each.epsilon, each.gamma) for name, each in experiments.items()}
    assert shown["V-A"] == (3e-8, 0.0, 1e-4, (0.6,))
    assert shown["V-B"] == shown["VI-A"] == shown["VI-B"] == (0.004, 0.005, 5e-6, (0.005,))
    assert shown["VI-C"] == (0.0005, 0.1, 0.002, (3e-6, 3e-5))
    assert experiments["VI-C"].growth(390)(60 * 390 + 1) == pytest.approx(3e-6 * 60 * 390 + 3e-5)
    assert experiments["V-B"].steps(experiments["V-B"].train1, 390) == 500 * 390
    assert {each.data for each in experiments.values()} == {"eggholder", f"cifar10:{tmp_path}"}


def test_shortening_lets_gamma_go_through_the_same_values() -> None:
    long, short = (replace(experiment.load()["V-B"], shorten=factor) for factor in (1, 5))
    steps = [each.steps(each.opt2, 10) for each in (long, short)]
    assert steps[0] == 5 * steps[1]
    assert long.growth(10)(steps[0]) == pytest.approx(short.growth(10)(steps[1]))


def test_an_unknown_experiment_of_the_paper_is_refused(results: str) -> None:
    with pytest.raises(ValueError, match="VI-D"):
        paper.run("VI-D", results=results)
