"""One experiment, run: all arms of a seed, or of all seeds, side by side as `Replicas`, with a curve and scores of each."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.jumps import Jumps, watching
from bypass_fx import BypassSchedule, NonFiniteError, geometry, surgery
from bypass_fx.feed import in_order, placed
from bypass_fx.geometry import Point
from bypass_fx.replicas import Replicas
from bypass_fx.task import task

from .experiment import BASELINE, Experiment
from .saved import Saved

Row = dict[str, Any]
Pairs = list[tuple[nn.Module, Optimizer]]
RECORDS, SCORES = 100, 6  # along a walk; along train1 a third of the records
COLUMNS = ("step", "phase", "loss", "residual", "size", "distance", "cosine", "relative")


class Stage:
    """What every walk of an experiment shares: the data, the task, the device, and θ* once it has been trained."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.examples = experiment.examples()
        self.task = task(self.examples.task)
        self.per_epoch = experiment.feed(self.examples, 0).steps_per_epoch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._shared: tuple[Pairs, list[Row]] | None = None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a minibatch."""
        return self.task.loss(model, batch)

    def batches(self, seed: int, step: int) -> Iterator[Any]:
        """The minibatches from a step on."""
        for (batch,) in self.experiment.feed(self.examples, seed).from_step(step):
            yield placed(batch, self.device)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, float]:
        """Loss and metric over both whole sets, in evaluation mode."""
        model.eval()
        found = dict[str, float]()
        for part, examples in (("train", self.examples.train), ("test", self.examples.test)):
            sums = [self.task.sums(model, placed(batch, self.device)) for batch, _ in in_order(examples)]
            score = self.task.score(torch.stack(sums).sum(0).tolist())
            found |= {f"{part}_{name}": _short(value) for name, value in score.items()}
        model.train()
        return found

    @torch.no_grad()
    def exact_loss(self, model: nn.Module) -> float:
        """The training loss in double precision, in evaluation mode."""
        twin = copy.deepcopy(model).double().eval()
        total, count = 0.0, 0
        for batch, _ in in_order(self.examples.train):
            x, y = placed(batch, self.device)
            doubles = x.double(), y.double() if y.is_floating_point() else y
            total += float(self.task.loss(twin, doubles)) * len(x)
            count += len(x)
        return total / count

    def start(self, seeds: Sequence[int]) -> tuple[Pairs, list[Row]]:
        """θ* and its optimiser for each seed, with the curve of train1."""
        if not self.experiment.one_start:
            return self._train1(seeds)
        if self._shared is None:
            self._shared = self._train1([0])  # which stays saved, for the seeds to come
        ((pair,), (curve,)) = self._shared
        return [copy.deepcopy(pair) for _ in seeds], [curve for _ in seeds]

    def _train1(self, seeds: Sequence[int]) -> tuple[Pairs, list[Row]]:
        pairs = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = self.experiment.build(self.examples).to(self.device)
            pairs.append((model, self.experiment.optimizer_of(model)))
        steps = self.experiment.steps(self.experiment.train1, self.per_epoch)
        means, every = _Means(len(seeds)), max(1, steps // (RECORDS // 3))
        curves: list[Row] = [{"step": [], "loss": []} for _ in seeds]
        saved, first = Saved(self.experiment, "start", seeds), 0
        if kept := saved.load():
            first, state = kept
            curves = state["curves"]
            _load(pairs, state)
            means.load(state["means"])
        replicas = Replicas([model for model, _ in pairs], [optimizer for _, optimizer in pairs], self.at_once)

        def state_now() -> Row:
            return {"curves": curves, "means": means.state(), **_states(pairs)}

        for step, batch in zip(range(first + 1, steps + 1), self.batches(seeds[0], first), strict=False):
            losses = replicas.backward(self.loss, batch, shared=True)
            replicas.step()
            means.add(losses)
            if step % every == 0 or step == steps:
                for curve, loss in zip(curves, means.take([*range(len(seeds))]), strict=True):
                    curve["step"].append(step)
                    curve["loss"].append(loss)
            saved.offer(step, state_now)
        if first < steps:
            saved.save(steps, state_now())
        return pairs, curves

    @property
    def at_once(self) -> int | None:
        """How many replicas go through the model together."""
        return self.experiment.at_once or None


class _Means:
    """The mean loss of each row since its last record."""

    def __init__(self, rows: int) -> None:
        self._sum, self._count = torch.zeros(rows), torch.zeros(rows)

    def add(self, losses: Tensor) -> None:
        self._sum, self._count = self._sum.to(losses) + losses, self._count + 1

    def take(self, rows: list[int]) -> list[float]:
        means = self._sum[rows] / self._count[rows].to(self._sum)
        self._sum[rows] = self._count[rows] = 0
        return [_short(value) for value in means.tolist()]

    def state(self) -> list[Tensor]:
        return [self._sum, self._count]

    def load(self, state: list[Tensor]) -> None:
        self._sum, self._count = state


@dataclass(frozen=True, slots=True)
class Arm:
    """One replica of a walk."""

    name: str
    seed: int
    baseline: int | None  # the row of the same seed that is not bypassed


class Walk:
    """All arms of some seeds after θ*: opt1, opt2 and train3, or on as before."""

    def __init__(self, stage: Stage, seeds: Sequence[int]) -> None:
        self.stage, experiment = stage, stage.experiment
        starts, self._before = stage.start(seeds)
        names = [*([BASELINE] if "bypass" in experiment.arms else []), *experiment.arms]
        self.arms = [
            Arm(name, seed, place if names[0] == BASELINE else None)
            for name in names
            for place, seed in enumerate(seeds)
        ]
        places = [place for _ in names for place in range(len(seeds))]
        pairs = [copy.deepcopy(starts[place]) for place in places]
        self._before = [self._before[place] for place in places]
        self.first = experiment.steps(experiment.train1, stage.per_epoch)
        self.replicas = Replicas([model for model, _ in pairs], [optimizer for _, optimizer in pairs], stage.at_once)
        self._theta = [geometry.point(model) for model in self.replicas.models]
        at_start = [stage.scores(model) for model in self.replicas.models]
        self._curves: list[Row] = [{column: [] for column in COLUMNS} for _ in self.arms]
        self._scores: list[dict[int, dict[str, float]]] = [{self.first: scores} for scores in at_start]
        self._ends: list[dict[str, int]] = [{"θ*": self.first} for _ in self.arms]
        self._began = [0 for _ in self.arms]  # the step before each row's phase
        self._shocks = [0.0 for _ in self.arms]
        self._means, self._seconds, self._step = _Means(len(self.arms)), 0.0, 0
        self._saved = Saved(experiment, "seeds", seeds)
        self._begin(self._saved.load())

    def _begin(self, kept: tuple[int, Row] | None) -> None:
        """Begin the bypasses, or go on with them as they were saved."""
        rows = iter(range(len(self.arms)))
        states = kept[1]["schedules"] if kept else None

        def begin(model: nn.Module, optimizer: Optimizer) -> BypassSchedule | None:
            row = next(rows)
            name, experiment = self.arms[row].name, self.stage.experiment
            if name == BASELINE:
                return None
            schedule = experiment.arm(name).schedule(model, optimizer, self.stage.per_epoch)
            if states:
                schedule.load_state_dict(states[row])
            return schedule

        self.replicas.lead(begin)
        if kept:
            self._step, state = kept
            self._load(state)

    def _load(self, state: Row) -> None:
        _load(self._pairs, state)
        self.replicas.failures = {row: NonFiniteError(told) for row, told in state["failures"].items()}
        self._means.load(state["means"])
        self._curves, self._ends, self._began = state["curves"], state["ends"], state["began"]
        self._scores, self._shocks, self._seconds = state["scores"], state["shocks"], state["seconds"]

    def _state(self) -> Row:
        return {
            **_states(self._pairs),
            "schedules": [schedule.state_dict() if schedule else None for schedule in self.replicas.schedules],
            "failures": {row: str(error) for row, error in self.replicas.failures.items()},
            "means": self._means.state(),
            "curves": self._curves, "ends": self._ends, "began": self._began,
            "scores": self._scores, "shocks": self._shocks, "seconds": self._seconds,
        }  # fmt: skip

    @property
    def _pairs(self) -> Pairs:
        return [*zip(self.replicas.models, self.replicas.optimizers, strict=True)]

    def rows(self) -> list[Row]:
        """Walk to the end; a row for each arm and seed."""
        start, stage = time.perf_counter() - self._seconds, self.stage
        total = stage.experiment.total(stage.per_epoch)
        every, score_every = max(1, total // RECORDS), max(1, total // SCORES)
        means, first = self._means, self._step
        seed = self.arms[0].seed
        with warnings.catch_warnings(), watching(stage.exact_loss) as jumps:
            warnings.filterwarnings("ignore", "opt2 ended|penalty: after")  # both stand in the rows
            batches = stage.batches(seed, self.first + first)
            for step, batch in zip(range(first + 1, total + 1), batches, strict=False):
                last = step == total
                due = [*range(len(self.arms))] if step % every == 0 or last else self._due(step)
                before = {row: geometry.point(self.replicas.models[row]) for row in due}
                phases = self._phases()
                losses = self.replicas.backward(stage.loss, batch, shared=True)
                self.replicas.step(losses)
                means.add(losses)
                self._shock(jumps)
                self._end_phases(phases, step)
                if due:
                    self._record(self.first + step, phases, means.take(due), before)
                if step % score_every == 0 or last:
                    for row in range(len(self.arms)):
                        self._score(row, self.first + step)
                self._seconds = time.perf_counter() - start
                self._saved.offer(step, self._state)
        seconds = self._seconds / len(self.arms)
        return [self._row(row, self.first + total, seconds) for row in range(len(self.arms))]

    def forget(self) -> None:
        """The rows are in the results: what was saved of them can go."""
        self._saved.remove()

    def _phases(self) -> list[str]:
        on = {row: schedule.phase for row, schedule in enumerate(self.replicas.schedules) if schedule}
        return [
            "train3" if row in self.replicas.failures or on.get(row, "done") == "done" else on[row]
            for row in range(len(self.arms))
        ]

    def _due(self, step: int) -> list[int]:
        """The rows that are recorded after a step though not all are: 1, 2, 4, … steps into a phase, and their baselines."""
        found = set[int]()
        for row, began in enumerate(self._began):
            if (step - began) & (step - began - 1) == 0:
                found |= self._and_baseline(row)
        return sorted(found)

    def _and_baseline(self, row: int) -> set[int]:
        baseline = self.arms[row].baseline
        return {row} if baseline is None else {row, baseline}

    def _end_phases(self, before: list[str], step: int) -> None:
        for row, (then, now) in enumerate(zip(before, self._phases(), strict=True)):
            if then != now:
                self._ends[row]["after opt1" if then == "opt1" else "after proj"] = self.first + step
                self._began[row] = step
                for each in self._and_baseline(row):
                    self._score(each, self.first + step)

    def _score(self, row: int, step: int) -> None:
        if step not in self._scores[row]:
            self._scores[row][step] = self.stage.scores(self.replicas.models[row])

    def _shock(self, jumps: Jumps) -> None:
        while jumps:
            model, jump = jumps.pop()
            row = self.replicas.models.index(model)
            self._shocks[row] = max(self._shocks[row], jump)

    def _record(self, step: int, phases: list[str], losses: list[float], before: dict[int, Point]) -> None:
        norms, models = self.replicas.norms(), self.replicas.models
        for row, loss in zip(before, losses, strict=True):
            arm, curve = self.arms[row], self._curves[row]
            other = arm.baseline if arm.baseline != row else None
            others = None if other is None else (before[other], models[other])
            where = geometry.between(self._theta[row], before[row], models[row], others)
            values = (
                step, phases[row], loss, self._residual(row, norms), where.step, where.distance, where.cosine,
                where.relative,
            )  # fmt: skip
            for column, value in zip(COLUMNS, values, strict=True):
                curve[column].append(_short(value) if isinstance(value, float) else value)

    def _residual(self, row: int, norms: dict[str, Tensor]) -> float | None:
        if not surgery.is_extended(self.replicas.models[row]):
            return None
        return sum(float(norm[row]) for norm in norms.values())

    def _row(self, row: int, last: int, seconds: float) -> Row:
        arm, schedule, experiment = self.arms[row], self.replicas.schedules[row], self.stage.experiment
        report = schedule.report if schedule else None
        found: Row = {
            "experiment": experiment.name, "data": experiment.data.partition(":")[0], "length": experiment.length,
            "arm": arm.name, "seed": arm.seed, "per_epoch": self.stage.per_epoch,
            "ends": {**self._ends[row], "end": last}, "seconds": _short(seconds),
            "before": self._before[row], "curve": self._curves[row],
            "scores": {str(step): scores for step, scores in sorted(self._scores[row].items())},
        }  # fmt: skip
        if schedule is not None:
            failure = self.replicas.failures.get(row)
            found |= {"failure": str(failure) if failure else "", "jump": _short(self._shocks[row])}
        if report is not None:
            found |= {
                "arrived": not report.left_out, "opt2_steps": report.opt2_steps, "notes": [*report.notes],
                "norm_at_proj": _short(sum(each.norm for each in (*report.arrivals, *report.left_out))),
            }  # fmt: skip
        return found


def _states(pairs: Pairs) -> Row:
    return {
        "models": [model.state_dict() for model, _ in pairs],
        "optimizers": [optimizer.state_dict() for _, optimizer in pairs],
        "random": torch.get_rng_state(),
    }


def _load(pairs: Pairs, state: Row) -> None:
    for (model, optimizer), weights, moments in zip(pairs, state["models"], state["optimizers"], strict=True):
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    torch.set_rng_state(state["random"])


def _short(value: float) -> float:
    return float(f"{value:.6g}")
