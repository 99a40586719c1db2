"""What a step of many replicas costs beside a step of one: the Eggholder net, and 2c2d."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bypass_fx
from bypass_fx.models import Fit, TwoConvTwoDense
from bypass_fx.replicas import Replicas

from .comeback import TASKS
from .results_file import ResultsFile

FOR_EVER = 10**7  # steps of a phase, so that it outlasts the measurement
PHASES = ("plain", "opt1", "opt2 homotopy", "opt2 proximal", "opt2 published")


@dataclass(frozen=True, slots=True)
class Task:
    """A net and its minibatches; how many of its replicas go together, None for all, and how often it is measured."""

    net: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    at_once: int | None
    rounds: int
    steps: int
    threads: int


def _points(replicas: int) -> tuple[Tensor, Tensor]:
    return torch.randn(replicas, 100, 2), torch.randn(replicas, 100, 1)


def _images(replicas: int) -> tuple[Tensor, Tensor]:
    return torch.randn(replicas, 128, 3, 32, 32), torch.randint(10, (replicas, 128))


def _eggholder(optimizer: Callable[[Any], torch.optim.Optimizer]) -> Task:
    return Task(TASKS["eggholder"].net, optimizer, F.mse_loss, _points, None, rounds=15, steps=20, threads=1)


def _2c2d(at_once: int | None) -> Task:
    return Task(
        lambda: TwoConvTwoDense(Fit((3, 32, 32), 10)), lambda parameters: torch.optim.Adam(parameters, 1e-4),
        F.cross_entropy, _images, at_once, rounds=3 if at_once else 1, steps=1, threads=2,
    )  # fmt: skip


ROUNDS_ON_GPU, STEPS_ON_GPU = 7, 20  # at least


CASES: dict[str, tuple[Task, tuple[str, ...]]] = {
    "Eggholder net, SGD": (_eggholder(lambda parameters: torch.optim.SGD(parameters, 1e-9)), PHASES),
    "Eggholder net, Adam": (_eggholder(lambda parameters: torch.optim.Adam(parameters, 1e-9)), PHASES),
    "2c2d, Adam": (_2c2d(None), PHASES[:1]),
    "2c2d, Adam, in turn": (_2c2d(1), PHASES[:4]),
}


def measure(task: Task, phase: str, replicas: int, device: str) -> dict[str, Any]:
    """The time of a step of one model and of all replicas, alternating, and the median of their ratios."""
    torch.manual_seed(0)

    def begin(model: nn.Module, optimizer: torch.optim.Optimizer) -> bypass_fx.BypassSchedule | None:
        if phase == "plain":
            return None
        way, _, comeback = phase.partition(" ")
        return bypass_fx.BypassSchedule(
            model, optimizer, FOR_EVER if way == "opt1" else 0, FOR_EVER, gamma=bypass_fx.Linear(1e-9),
            epsilon=1e-30, comeback=comeback or "homotopy", snapshot=None,
        )  # fmt: skip

    x, y = (part.to(device) for part in task.batch(replicas))
    model = task.net().to(device)
    optimizer = task.optimizer(model.parameters())
    schedule = begin(model, optimizer)
    models = [task.net().to(device) for _ in range(replicas)]
    together = Replicas(models, [task.optimizer(each.parameters()) for each in models], task.at_once)
    together.lead(begin)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return task.loss(model(batch[0]), batch[1])

    def one() -> None:
        loss = loss_fn(model, (x[0], y[0]))
        (loss + schedule.penalty() if schedule else loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step(loss)

    def all_together() -> None:
        together.step(together.backward(loss_fn, (x, y)))

    count, steps = task.rounds, task.steps
    if device == "cuda":
        count, steps = max(count, ROUNDS_ON_GPU), max(steps, STEPS_ON_GPU)
    rounds = [(_time(one, steps), _time(all_together, steps)) for _ in range(count + 1)][1:]
    return {
        "one": median(alone for alone, _ in rounds),
        "together": median(whole for _, whole in rounds),
        "ratio": median(whole / alone for alone, whole in rounds),
    }


def _time(step: Callable[[], None], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def run(replicas: int = 20, results: str = "replicas-{device}.jsonl") -> ResultsFile:
    """Measure what no earlier run has measured, on a GPU if there is one, else on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    called = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    file = ResultsFile(results.format(device=device))
    done = {(row["case"], row["phase"], row["replicas"]) for row in file}
    for case, (task, phases) in CASES.items():
        torch.set_num_threads(task.threads)
        for phase in PHASES if device == "cuda" else phases:
            if (case, phase, replicas) not in done:
                about = {"case": case, "phase": phase, "replicas": replicas, "device": called}
                file.add({**about, "threads": task.threads, **measure(task, phase, replicas, device)})
    return file


def summary(file: ResultsFile) -> str:
    """A table in Markdown."""
    lines = [
        "A step of one model beside a step of all replicas, each on a minibatch of its own, with optimiser and schedule: "
        "medians of rounds that alternate. \"In turn\" is `at_once=1`.",
        "",
        "| model | phase | device | threads | replicas | one, ms | together, ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['case']} | {row['phase']} | {row['device']} | {row['threads']} | {row['replicas']} | "
        f"{1000 * row['one']:.2f} | {1000 * row['together']:.2f} | {row['ratio']:.1f} |"
        for row in file
    ]
    return "\n".join(lines) + "\n"
