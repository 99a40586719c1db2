"""The benchmark that asks whether bypassing helps: its arms race fairly, and its statistics count right."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bypass_fx
from benchmarks.helps import protocol, race, record, report, verdict
from benchmarks.helps.arms import Arm, kick
from benchmarks.helps.tasks import Task, minibatches
from benchmarks.results_file import ResultsFile
from bypass_fx.optimizers import make_optimizer
from bypass_fx.phases import Lengths, embedded
from bypass_fx.settings import preset

SHORT = protocol.read()
PLAIN, HOMOTOPY = Arm("continue", "plain"), Arm("homotopy", "bypass", comeback="homotopy", cycles=2)
SEEDS = [3, 5]


def _task(name: str) -> Task:
    return replace(SHORT.tasks[name], train1=12, steps=24, seeds=2)


def _raced(task: Task, arms: list[Arm], steps: int = 24) -> dict[str, torch.Tensor]:
    examples = task.examples()
    found = race.run(task, examples, race.begin(task, examples, SEEDS), arms, SEEDS, steps, SHORT.decay)
    return {name: torch.tensor(row["loss"]) for name, row in found.items()}


@pytest.mark.parametrize("name", ["eggholder", "digits"])
def test_an_arm_comes_to_the_same_whoever_races_beside_it(name: str) -> None:
    task = _task(name)
    alone, beside = _raced(task, [HOMOTOPY]), _raced(task, [PLAIN, HOMOTOPY])
    torch.testing.assert_close(alone["homotopy"], beside["homotopy"], rtol=1e-4, atol=1e-6)
    assert (beside["homotopy"] / beside["continue"] - 1).abs().min() > 1e-5


def test_an_arm_without_anything_to_do_is_plain_training() -> None:
    task = _task("digits")
    examples = task.examples()
    torch.manual_seed(SEEDS[0])
    model = task.build(examples)
    optimizer = torch.optim.Adam(model.parameters(), task.lr)
    feed = minibatches(examples, task.batch, SEEDS[:1], 1, 0)
    for step, (x, y) in zip(range(36), feed, strict=False):
        optimizer.param_groups[0]["lr"] = task.lr * (PLAIN.factor(step - 12, 24, SHORT.decay) if step >= 12 else 1.0)
        optimizer.zero_grad()
        examples.loss(model, (x[0], y[0])).backward()
        optimizer.step()
    ours = _raced(task, [PLAIN])["continue"][0]
    torch.testing.assert_close(examples.loss(model, examples.train).detach(), ours, rtol=1e-4, atol=1e-6)


def test_every_arm_takes_as_many_steps_on_the_same_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = _task("digits"), []
    backward = race.Replicas.backward

    def watched(
        replicas: race.Replicas, loss_fn: object, batch: tuple[torch.Tensor, ...], shared: bool = False
    ) -> object:
        seen.append(batch[0])
        return backward(replicas, loss_fn, batch, shared)  # type: ignore[arg-type]

    monkeypatch.setattr(race.Replicas, "backward", watched)
    _raced(task, [PLAIN, HOMOTOPY])
    assert len(seen) == task.train1 + task.steps
    assert all(torch.equal(batch[:2], batch[2:]) for batch in seen[task.train1 :])
    assert not torch.equal(seen[-1][0], seen[-1][1])  # seeds draw on their own
    assert not torch.equal(seen[-1], seen[-2])


def test_minibatches_of_an_epoch_do_not_overlap_and_can_begin_anywhere() -> None:
    examples = SHORT.tasks["digits"].examples()
    feed = minibatches(examples, 128, [7], 1, 0)
    first = [next(feed)[0][0] for _ in range(15)]
    assert len(torch.cat(first[:11]).unique(dim=0)) == len(examples.train[0][: 11 * 128].unique(dim=0))
    assert torch.equal(next(minibatches(examples, 128, [7], 1, 14))[0][0], first[14])
    assert torch.equal(next(minibatches(examples, 128, [9, 7], 2, 14))[0][3], first[14])


def test_rates_of_all_but_the_restarts_are_one_and_fall_to_zero() -> None:
    assert [PLAIN.factor(step, 100, 0.25) for step in (0, 50, 75)] == [1.0, 1.0, 1.0]
    assert 0 < PLAIN.factor(99, 100, 0.25) < 0.01
    restarts = Arm("restarts", "plain", rate="restarts")
    assert [restarts.factor(step, 300, 0.25) for step in (0, 100, 200)] == [2.0, 2.0, 2.0]
    assert restarts.factor(299, 300, 0.25) < 0.01


def test_a_bypass_may_begin_with_noise() -> None:
    noisy = replace(HOMOTOPY, name="noisy", noise=0.1)
    losses = _raced(_task("eggholder"), [noisy, HOMOTOPY])
    assert (losses["noisy"] / losses["homotopy"] - 1).abs().min() > 1e-4


def test_noise_is_measured_in_the_spread_of_each_tensor() -> None:
    values = torch.cat([100 * torch.randn(4000), torch.randn(4000), torch.full((1,), 3.0)])
    moved = values.clone()
    kick(moved, [4000, 4000, 1], 0.1, seed=1)
    wide, narrow, single = (moved - values).split([4000, 4000, 1])
    assert wide.std() == pytest.approx(10, rel=0.1) and narrow.std() == pytest.approx(0.1, rel=0.1)
    assert 0 < abs(float(single)) < 1.5
    assert Arm("noise", "plain", noise=0.1, kicks=3).kick_steps(400, 0.25) == [0, 100, 200]
    assert PLAIN.kick_steps(400, 0.25) == []


def test_sam_takes_its_gradient_where_the_loss_is_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(_task("eggholder"), train1=1)
    examples, losses = task.examples(), []
    backward = race.Replicas.backward

    def watched(replicas: race.Replicas, *arguments: object, **named: object) -> torch.Tensor:
        losses.append(backward(replicas, *arguments, **named))  # type: ignore[arg-type]
        return losses[-1]

    start = race.begin(task, examples, SEEDS)
    monkeypatch.setattr(race.Replicas, "backward", watched)
    race.run(task, examples, start, [Arm("sam", "plain", sam=0.05)], SEEDS, 1, SHORT.decay)
    assert len(losses) == 2 and bool((losses[1] > losses[0]).all())


def test_accepted_bypasses_are_judged_and_said_to_be() -> None:
    never = Arm("never", "bypass", comeback="homotopy", walk=0.5, delta_lr=1e4, accept="not-worse")
    task = _task("eggholder")
    examples = task.examples()
    row = race.run(task, examples, race.begin(task, examples, SEEDS), [never], SEEDS, 24, SHORT.decay)["never"]
    assert row["rolled_back"] == [True, True] and row["failed"] == []
    assert len(row["curve"]) == 24 and row["curve"][-1][1] == pytest.approx(math.prod(row["loss"]) ** 0.5, rel=1e-4)


def test_where_a_probe_finds_nothing_the_seed_trains_on() -> None:
    probed = Arm("probed", "bypass", comeback="homotopy", select="probe")
    task = replace(_task("eggholder"), lr=1e-30)  # no step gains anything
    examples = task.examples()
    row = race.run(task, examples, race.begin(task, examples, SEEDS), [probed], SEEDS, 6, SHORT.decay)["probed"]
    assert row["not_bypassed"] == [*range(len(SEEDS))] and row["rolled_back"] == [False, False] and row["failed"] == []


def test_two_thirds_of_the_seeds_won_by_half_is_what_the_statistics_say() -> None:
    values = [0.5, 0.5, 1.0, 0.9991, 1.0009, 2.0]
    assert verdict.tally(values) == verdict.Tally(2 / 6, 3 / 6, 1 / 6)
    assert verdict.geometric_mean([[0.5, 2.0], [0.25, 0.25, 0.25]]) == pytest.approx(0.5)
    assert verdict.best_plain({"a": [1.0, 1.0, 1.0], "b": [0.1, 0.1, 99.0], "c": [1.1, 1.0, 1.0]}) == "b"


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(100):
        by_task = [(0.3 * torch.randn(20, generator=generator) - 0.2).exp().tolist() for _ in range(2)]
        low, high = verdict.bootstrap(by_task, draws=500)
        hits += low < math.exp(-0.2) < high
    assert 85 <= hits <= 99
    assert verdict.bootstrap([[0.5] * 4], draws=50) == (pytest.approx(0.5), pytest.approx(0.5))


def test_every_strict_site_of_the_transformer_is_found_in_each_block() -> None:
    task = SHORT.tasks["transformer"]
    plan = bypass_fx.plan(task.build(task.examples()))
    assert len([site for site in plan if site.kind == "strict"]) == 2 * task.net["blocks"] == len(plan.sites)


@pytest.mark.parametrize("full", [False, True])
def test_every_part_holds_regressions_and_classifications_and_they_share_no_net(full: bool) -> None:
    read = protocol.read(full)
    halves = [{task.data["kind"]: task for task in read.of(stage)} for stage in ("search", "held-out", "fresh")]  # type: ignore[arg-type]
    assert all({"function"} < half.keys() for half in halves)
    nets = [{(str(task.data), str(task.net)) for task in half.values()} for half in halves]
    assert not nets[0] & nets[1] and not nets[2] & (nets[0] | nets[1])
    for task in read.tasks.values():
        assert not {*read.seeds("search", task)} & {*read.seeds("held-out", task)}
    assert ("cifar10" in protocol.read(full, "somewhere").tasks) and "cifar10" not in read.tasks


def test_a_stage_is_run_once_and_reported(tmp_path: Path) -> None:
    arms = (PLAIN, Arm("sam", "plain", sam=0.05)), (HOMOTOPY,)
    small = replace(
        SHORT,
        tasks={"eggholder": _task("eggholder")},
        plain=arms[0],
        search=arms[1],
        verdict=arms[1],
    )
    threads = torch.get_num_threads()
    try:
        file = record.run(small, "in-sample", "egg", name=str(tmp_path / "helps.jsonl"))
        count = len(file.rows)
        assert len(record.run(small, "in-sample", "egg", name=str(tmp_path / "helps.jsonl")).rows) == count
    finally:
        torch.set_num_threads(threads)
    timed = report.rows_of(file, "eggholder", "time")["homotopy"]
    assert {row["arm"] for row in file if row["kind"] == "arm"} == {"continue", "sam", "homotopy"}
    assert {*report.rows_of(file, "eggholder", "time")} == {"sam", "homotopy"}
    assert timed["steps"] < 24 or next(row for row in file if row["kind"] == "costs")["costs"]["homotopy"] <= 1
    told = report.summary(small, "in-sample", file)
    assert "| homotopy | " in told and f"| homotopy, equal time ({timed['steps']} steps) | " in told
    report.draw(small, file, tmp_path / "helps.png")
    assert (tmp_path / "helps.png").stat().st_size > 5000


def test_an_arm_that_did_not_run_everywhere_says_where_not(tmp_path: Path) -> None:
    file = ResultsFile(str(tmp_path / "helps.jsonl"), ("torch",))
    tasks = {name: _task(name) for name in ("eggholder", "ackley")}
    small = replace(SHORT, tasks=tasks, plain=(PLAIN,), verdict=(HOMOTOPY,))
    for task in tasks:
        file.add({"kind": "costs", "task": task, "costs": {"continue": 1.0, "homotopy": 1.1}})
        for arm, family, loss in (("homotopy", "bypass", 0.5), ("continue", "plain", 1.0)):
            if (arm, task) != ("homotopy", "ackley"):
                row = {"loss": [loss], "test_loss": [1.0], "seeds": [0], "at_start": [2.0], "rolled_back": [False]}
                about = {"kind": "arm", "task": task, "arm": arm, "family": family, "budget": "steps"}
                file.add({**about, "train1": 1, "steps": 1, **row})
    told = report.summary(small, "in-sample", file)
    assert "| continue | 1.000 |" in told and "| homotopy, without ackley | 0.500 |" in told
    assert told.index("| continue | 1.000 |") < told.index("| homotopy, without ackley |")


def test_the_preset_of_the_library_is_what_the_search_froze() -> None:
    frozen, library = next(arm for arm in SHORT.verdict if arm.name == "preset"), preset("improved")
    assert (library.comeback, library.cycles, library.delta_rate) == (frozen.comeback, frozen.cycles, frozen.delta_lr)
    assert library.select == frozen.select == "stuck"
    assert library.opt1 / library.opt2 == pytest.approx(frozen.walk / frozen.back)
    cycle = library.opt1 + library.opt2 + library.train3
    assert library.opt1 / cycle == pytest.approx(frozen.walk)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = make_optimizer(model, library)
    embedded(model, optimizer, library, bypass_fx.plan(model), Lengths.of(library, 1))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([library.lr, 5 * library.lr])


def test_modules_of_a_dense_net() -> None:
    task = SHORT.tasks["ackley"]
    net = task.build(task.examples())
    assert [type(module) for module in net.children()] == [nn.Linear, nn.Tanh] * 3 + [nn.Linear]
