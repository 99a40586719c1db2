"""The race of a task: every arm from the same θ*, seed by seed on the same minibatches, for as many steps."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, repeat
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import bypass_fx
from bypass_fx.replicas import Replicas

from .arms import Arm, kick
from .tasks import Examples, Pair, Task, minibatches

CHUNK = 2000  # examples that are evaluated at once
PROBE_STEPS = 20
FOR_EVER = 10**7


@dataclass(frozen=True, slots=True)
class Start:
    """θ* of every seed: models and optimisers, and the training losses on the way there, [looks, seeds]."""

    replicas: Replicas
    losses: Tensor


def begin(task: Task, examples: Examples, seeds: Sequence[int]) -> Start:
    """Train every seed to its θ*."""
    models, optimizers = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(task.build(examples))
        optimizers.append(torch.optim.Adam(models[-1].parameters(), task.lr))
        optimizers[-1].param_groups[0]["initial_lr"] = task.lr
    replicas, losses = Replicas(models, optimizers, task.at_once), []
    for step, batch in zip(range(task.train1), batches(task, examples, seeds, 1, 0), strict=False):
        replicas.step(replicas.backward(examples.loss, batch, shared=not task.batch))
        if (step + 1) % max(1, task.train1 // task.looks) == 0:
            losses.append(score(replicas, examples, examples.train)["loss"])
    return Start(replicas, torch.stack(losses))


def stuck_at(start: Start, examples: Examples) -> dict[str, Any]:
    """How many channels are stuck at each θ*, [seeds], of how many."""
    found = [bypass_fx.stuck(model, examples.loss, [examples.train], mode="all") for model in start.replicas.models]
    return {"stuck": [report.stuck for report in found], "channels": found[0].channels}


def batches(task: Task, examples: Examples, seeds: Sequence[int], copies: int, first: int) -> Iterator[Pair]:
    """What the steps are taken on: one set for all, or minibatches, [copies · seeds, …]."""
    if task.batch:
        return minibatches(examples, task.batch, list(seeds), copies, first)
    return repeat(examples.train)


def run(
    task: Task, examples: Examples, start: Start, arms: Sequence[Arm], seeds: Sequence[int], steps: int, decay: float
) -> dict[str, dict[str, Any]]:
    """Let arms race side by side; only arms with SAM take a second gradient, so they race among themselves.

    Returns:
        For each arm its losses and accuracies at the end, [seeds], and the geometric means of the losses on the way.
    """
    began = time.perf_counter()
    twins = [copy.deepcopy(start.replicas) for _ in arms]
    replicas = Replicas(
        [model for twin in twins for model in twin.models],
        [optimizer for twin in twins for optimizer in twin.optimizers],
        task.at_once,
    )
    sizes = [parameter.numel() for parameter in replicas.models[0].parameters() if parameter.requires_grad]  # without D
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "opt2 ended|penalty")
        _lead(replicas, task, examples, start, arms, seeds, steps)
        curve = _steps(replicas, task, examples, sizes, arms, seeds, steps, decay)
    scores = {part: score(replicas, examples, getattr(examples, part)) for part in ("train", "test")}
    seconds = time.perf_counter() - began
    found = {}
    for index, arm in enumerate(arms):
        rows = slice(index * len(seeds), (index + 1) * len(seeds))
        found[arm.name] = {
            "loss": scores["train"]["loss"][rows].tolist(),
            **{f"test_{name}": values[rows].tolist() for name, values in scores["test"].items()},
            "curve": [[step, float(losses[rows].clamp_min(1e-12).log().mean().exp())] for step, losses in curve],
            "rolled_back": [
                bool(s and any(report.rolled_back for report in s.reports)) for s in replicas.schedules[rows]
            ],
            "not_bypassed": [i for i, s in enumerate(replicas.schedules[rows]) if s is None] if arm.comeback else [],
            "failed": sorted(row - rows.start for row in replicas.failures if rows.start <= row < rows.stop),
            "seconds": seconds / len(arms),
        }
    return found


def _lead(
    replicas: Replicas,
    task: Task,
    examples: Examples,
    start: Start,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    steps: int,
) -> None:
    coming = iter([(arm, index) for arm in arms for index in range(len(seeds))])
    every = max(1, task.train1 // task.looks)

    def evaluate(model: nn.Module) -> float:
        return float(_mean(lambda batch: examples.loss(model, batch), examples.train))

    def lead(model: nn.Module, optimizer: torch.optim.Optimizer) -> bypass_fx.BypassSchedule | None:
        arm, index = next(coming)
        if not arm.comeback:
            return None
        some = [next(batches(task, examples, seeds[index : index + 1], 1, task.train1)) for _ in range(1)]
        if task.batch:
            some = [(x[0], y[0]) for x, y in some]
        measuring = {
            "stuck": {"loss_fn": examples.loss, "batches": [examples.train]},
            "probe": {"loss_fn": examples.loss, "batches": some, "steps": PROBE_STEPS},
        }
        try:
            return arm.schedule(model, optimizer, steps, evaluate, start.losses[:, index].tolist(), every, measuring)
        except bypass_fx.PlanError:
            if arm.select not in measuring:
                raise
            return None  # there is nothing to bypass: train on

    replicas.lead(lead)


def _steps(
    replicas: Replicas, task: Task, examples: Examples, sizes: Sequence[int], arms: Sequence[Arm], seeds: Sequence[int],
    steps: int, decay: float,
) -> list[tuple[int, Tensor]]:  # fmt: skip
    rows = list(product(arms, seeds))
    rho = torch.tensor([arm.sam for arm, _ in rows]).unsqueeze(1)
    kicks = {(arm.name, step) for arm in arms for step in arm.kick_steps(steps, decay)}
    curve = []
    feed = batches(task, examples, seeds, len(arms), task.train1)
    for step, batch in zip(range(steps), feed, strict=False):
        factors = {arm.name: arm.factor(step, steps, decay) for arm in arms}
        for row, ((arm, seed), optimizer) in enumerate(zip(rows, replicas.optimizers, strict=True)):
            if (arm.name, step) in kicks:
                kick(replicas.values[row], sizes, arm.noise, 7919 * seed + step)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factors[arm.name]
        losses = replicas.backward(examples.loss, batch, shared=not task.batch)
        if rho.any():
            gradients = replicas.gradients
            shift = rho * gradients / torch.linalg.vector_norm(gradients, dim=1, keepdim=True).clamp_min(1e-12)
            replicas.values.add_(shift)
            replicas.backward(examples.loss, batch, shared=not task.batch)
            replicas.values.sub_(shift)
        replicas.step(losses)
        if (step + 1) % max(1, steps // task.looks) == 0:
            curve.append((step + 1, score(replicas, examples, examples.train)["loss"]))
    return curve


def score(replicas: Replicas, examples: Examples, pair: Pair) -> dict[str, Tensor]:
    """The loss, and where there are classes the accuracy, over a set in evaluation mode, [replicas]."""
    replicas.train(False)
    measures = {"loss": examples.loss}
    if examples.kind == "classification":
        measures["accuracy"] = examples.accuracy
    found = {name: _mean(lambda batch, of=of: replicas(of, batch, shared=True), pair) for name, of in measures.items()}
    replicas.train()
    return found


def _mean(of: Any, pair: Pair) -> Any:
    """The mean of something over a set, in portions."""
    x, y = pair
    parts = [(of((x[i : i + CHUNK], y[i : i + CHUNK])), len(x[i : i + CHUNK])) for i in range(0, len(x), CHUNK)]
    return sum(value * count for value, count in parts) / len(x)


def costs(task: Task, examples: Examples, arms: Sequence[Arm], rounds: int = 7, steps: int = 8) -> dict[str, float]:
    """What a run of each arm costs over one of plain training, from the steps of one model of each kind, alternating.

    The noise costs nothing; the probe's own steps are left out.
    """
    torch.manual_seed(0)
    batch = next(batches(task, examples, [0], 1, 0))
    x, y = batch if not task.batch else (batch[0][0], batch[1][0])
    kinds = {"plain": ""} | {"opt1": "opt1"} | {arm.comeback: arm.comeback for arm in arms if arm.comeback}
    if any(arm.sam for arm in arms):
        kinds["sam"] = "sam"
    walkers = {kind: _Walker(task, examples, kind) for kind in kinds}
    timed: dict[str, list[float]] = {kind: [] for kind in kinds}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "opt2 ended|penalty")
        for _ in range(rounds + 1):
            for kind, walker in walkers.items():
                timed[kind].append(walker.seconds((x, y), steps))
    ratio = {kind: median(a / b for a, b in zip(timed[kind][1:], timed["plain"][1:], strict=True)) for kind in kinds}
    found = {}
    for arm in arms:
        if arm.comeback:
            found[arm.name] = 1 + arm.walk * (ratio["opt1"] - 1) + arm.back * (ratio[arm.comeback] - 1)
        else:
            found[arm.name] = ratio["sam"] if arm.sam else 1.0
    return found


class _Walker:
    """One model that takes steps of one kind."""

    def __init__(self, task: Task, examples: Examples, kind: str) -> None:
        self._examples, self._kind = examples, kind
        self._model = task.build(examples)
        self._optimizer = torch.optim.Adam(self._model.parameters(), task.lr)
        self._schedule: bypass_fx.BypassSchedule | None = None
        if kind not in ("plain", "sam"):
            opt1, comeback = (FOR_EVER, "homotopy") if kind == "opt1" else (0, kind)
            self._schedule = bypass_fx.BypassSchedule(
                self._model, self._optimizer, opt1, FOR_EVER, gamma=bypass_fx.Linear(1e-9), epsilon=1e-30,
                comeback=comeback, snapshot=None,
            )  # fmt: skip

    def seconds(self, batch: Pair, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            loss = self._backward(batch)
            if self._kind == "sam":
                self._backward(batch)
                with torch.no_grad():  # the shift and the way back
                    parameters_to_vector(self._model.parameters()).add_(0.0).sub_(0.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            if self._schedule:
                self._schedule.step(loss)
        return time.perf_counter() - began

    def _backward(self, batch: Pair) -> Tensor:
        loss = self._examples.loss(self._model, batch)
        (loss + self._schedule.penalty() if self._schedule else loss).backward()  # type: ignore[no-untyped-call]
        return loss
