"""Every way back on Eggholder (the paper's Sec. V-A) and on the digits: arrivals, norms, losses on the way, jumps."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bypass_fx
from bypass_fx import comeback as returns
from bypass_fx import data, param_group, surgery
from bypass_fx.feed import Feed

from .jumps import watching
from .results_file import ResultsFile

Batches = Iterator[tuple[Tensor, Tensor]]

ARMS: dict[str, Callable[[], returns.Comeback]] = {
    "penalty, as published": lambda: returns.Penalty(hand_over=False),
    "penalty": returns.Penalty,
    "proximal": returns.Proximal,
    "homotopy": returns.Homotopy,
    "lagrangian": returns.AugmentedLagrangian,
    "variety": returns.Variety,
}
TO_THE_END = ("homotopy", "lagrangian", "variety")  # these end exactly, and need no ε: measured without one too
NO_EPSILON = 1e-30


def arms() -> list[str]:
    """The rows of a table."""
    return [*ARMS, *(f"{name}, no ε" for name in TO_THE_END)]


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained, for how many steps of each phase, and how it comes back."""

    net: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int
    train1: int
    opt1: int
    opt2: int
    gamma: float
    epsilon: float


TASKS: dict[str, Task] = {
    "eggholder": Task(
        net=lambda: nn.Sequential(nn.Linear(2, 10), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 3e-8),
        loss=F.mse_loss, batch=100, train1=150_000, opt1=4000, opt2=2500, gamma=0.6, epsilon=1e-4,
    ),
    "digits": Task(
        net=lambda: nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 10)),
        optimizer=lambda parameters: torch.optim.Adam(parameters, 4e-3),
        loss=F.cross_entropy, batch=256, train1=3000, opt1=500, opt2=1000, gamma=0.005, epsilon=5e-6,
    ),
}  # fmt: skip


class _Run:
    """A model with its optimiser on minibatches, at one point of its training."""

    def __init__(self, name: str, seed: int) -> None:
        self.task, self.seed = TASKS[name], seed
        self.examples = data.load(name, vectors=True).train
        assert isinstance(self.examples, TensorDataset)
        self.x, self.y = self.examples.tensors
        torch.manual_seed(seed)
        self.model = self.task.net()
        self.optimizer = self.task.optimizer(self.model.parameters())
        self.steps = 0

    def batches(self) -> Batches:
        """The minibatches from the present step on."""
        if self.task.batch >= len(self.x):
            yield from ((self.x, self.y) for _ in count())
        for ((x, y),) in Feed(self.examples, self.task.batch, self.seed).from_step(self.steps):
            yield x, y

    def step(self, batch: tuple[Tensor, Tensor], schedule: bypass_fx.BypassSchedule | None = None) -> float:
        """One optimiser step; the loss without the penalty."""
        x, y = batch
        loss = self.task.loss(self.model(x), y)
        value = loss.item()
        (loss + schedule.penalty() if schedule else loss).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return value

    def exact_loss(self, model: nn.Module) -> float:
        """The loss over the training set in double precision."""
        x = self.x.double()
        y = self.y.double() if self.y.is_floating_point() else self.y
        with torch.no_grad():
            return float(self.task.loss(copy.deepcopy(model).double()(x), y))


def examine(name: str, seed: int, todo: list[str]) -> Iterator[dict[str, Any]]:
    """These returns from the end of one opt1, one after another on the same minibatches."""
    run = _Run(name, seed)
    for _, batch in zip(range(run.task.train1), run.batches(), strict=False):
        run.step(batch)
    at_start = run.exact_loss(run.model)
    bypass_fx.extend(run.model, mode="strict")
    deltas = [surgery.delta_of(run.model, site) for site in bypass_fx.sites(run.model)]
    param_group.add(run.optimizer, deltas, like=run.model.parameters())
    for _, batch in zip(range(run.task.opt1), run.batches(), strict=False):
        run.step(batch)
    about = {
        "task": name, "seed": seed, "loss_at_start": at_start, "loss_after_opt1": run.exact_loss(run.model),
        "norm_after_opt1": sum(float(norm) for norm in bypass_fx.norms(run.model).values()),
    }  # fmt: skip
    for arm in todo:
        yield {**about, "arm": arm, **_come_back(copy.deepcopy(run), arm)}


def _come_back(run: _Run, arm: str) -> dict[str, Any]:
    task, start = run.task, time.perf_counter()
    twin = copy.deepcopy(run.model)
    comeback, _, no_epsilon = arm.partition(", no ")
    schedule = bypass_fx.BypassSchedule(
        run.model, run.optimizer, 0, task.opt2, gamma=bypass_fx.Linear(task.gamma),
        epsilon=NO_EPSILON if no_epsilon else task.epsilon, comeback=ARMS[comeback](), snapshot=None,
    )  # fmt: skip
    out, highest, step_jump = schedule.out, 0.0, 0.0
    jump = 0.0
    for batch in run.batches():
        highest = max(highest, run.step(batch, schedule))
        before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        with warnings.catch_warnings(record=True), watching(run.exact_loss) as jumps:
            schedule.step()
        jump = max([jump, *(change for _, change in jumps)])
        if schedule.out != out:  # an arrival, or the end: what did the step of the schedule do to the loss?
            out = schedule.out
            twin.load_state_dict(before)
            then, now = run.exact_loss(twin), run.exact_loss(run.model)
            step_jump = max(step_jump, abs(now - then) / then)
        if schedule.phase == "done":
            break
    report = schedule.report
    assert report is not None
    arrivals = (*report.arrivals, *report.left_out)
    return {
        "sites": len(arrivals), "arrived": len(report.arrivals), "steps": report.opt2_steps,
        "norm": max(arrival.norm for arrival in arrivals), "delta": max(arrival.delta for arrival in arrivals),
        "highest": highest, "loss_at_end": run.exact_loss(run.model), "jump": jump, "step_jump": step_jump,
        "notes": list(report.notes), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def run(seeds: int = 20, results: str = "comeback.jsonl") -> ResultsFile:
    """Run the seeds that no earlier run has finished."""
    from rich.progress import track

    torch.set_num_threads(1)  # the nets are tiny
    file = ResultsFile(results, ("torch",))
    done = {(row["task"], row["seed"], row["arm"]) for row in file}
    jobs = [(name, seed) for seed in range(seeds) for name in TASKS]
    for name, seed in track(jobs, description="comeback"):
        if todo := [arm for arm in arms() if (name, seed, arm) not in done]:
            for row in examine(name, seed, todo):
                file.add(row)
    return file


def summary(file: ResultsFile) -> str:
    """A table for each task, in Markdown."""
    lines = [
        "From the same θ\\* and the same opt1 on the same minibatches. Arrived: seeds in which every site came within ε "
        "of its constraint in the budget. Steps, norms and losses are medians over the seeds (highest in brackets); the "
        "norm is the largest ‖ADW‖ of a site as it was projected, D is ‖D‖ then, the highest loss is that of a minibatch "
        "in opt2, and the jump is the relative change of the training loss, in double precision, by proj (or by the "
        "contraction of what is still out), and by the whole step of the schedule in which it happens, the last "
        "shrinking included.",
    ]
    for name, task in TASKS.items():
        rows = [row for row in file if row["task"] == name]
        if not rows:
            continue
        first = [row for row in rows if row["arm"] == next(iter(ARMS))]
        lines += [
            "",
            f"**{name}**: {len(first)} seeds, {rows[0]['sites']} strict sites, train1 {task.train1}, opt1 {task.opt1}, "
            f"budget of opt2 {task.opt2} steps, γ = {task.gamma}t, ε = {task.epsilon:g}. Loss at θ\\* "
            f"{_middle(first, 'loss_at_start')}, after opt1 {_middle(first, 'loss_after_opt1')}; Σ‖ADW‖ after opt1 "
            f"{_middle(first, 'norm_after_opt1')}.",
            "",
            "| return | arrived | steps | ‖ADW‖ | D | highest loss | loss at the end | jump at proj | jump of the step |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in arms():
            of_arm = [row for row in rows if row["arm"] == arm]
            arrived = sum(row["arrived"] == row["sites"] for row in of_arm)
            cells = [
                _spread(of_arm, key)
                for key in ("steps", "norm", "delta", "highest", "loss_at_end", "jump", "step_jump")
            ]
            lines.append(f"| {arm} | {arrived} of {len(of_arm)} | " + " | ".join(cells) + " |")
    seconds = sum(row["seconds"] for row in file)
    lines += ["", f"{seconds / 60:.0f} minutes of bypasses on one thread of a busy machine, train1 not counted."]
    return "\n".join(lines) + "\n"


def _middle(rows: list[dict[str, Any]], key: str) -> str:
    return _number(median(row[key] for row in rows))


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    return f"{_middle(rows, key)} ({_number(max(row[key] for row in rows))})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
