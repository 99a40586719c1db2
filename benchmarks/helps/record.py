"""Running the protocol: each arm of each task once, a line in the results as soon as it is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from benchmarks.results_file import ResultsFile

from . import race
from .arms import Arm
from .protocol import Protocol, Stage
from .tasks import Task

ROWS = 120  # replicas that race side by side


def file_of(protocol: Protocol, stage: Stage, name: str = "") -> ResultsFile:
    """The results of a stage, short or full."""
    return ResultsFile(
        name or f"helps-{stage}{'-full' if protocol.full else ''}.jsonl", ("torch", "timm", "scikit-learn")
    )


def run(protocol: Protocol, stage: Stage, only: str = "", chosen: Sequence[str] = (), name: str = "") -> ResultsFile:
    """Run what no earlier run has finished.

    Args:
        protocol: tasks, arms and lengths.
        stage: "search", "held-out", "fresh", "unseen", or "in-sample" for the verdict's arms on the searched half.
        only: only tasks whose name contains this.
        chosen: only arms of these names; all, if empty.
        name: another file for the results.
    """
    torch.set_num_threads(1)  # the nets are small
    file = file_of(protocol, stage, name)
    for task in protocol.of(stage):
        if only in task.name:
            arms = [arm for arm in protocol.arms(stage, task) if arm.name in chosen or not chosen]
            _task(protocol, stage, task, arms, file)
    return file


def costs(file: ResultsFile, task: str) -> dict[str, float]:
    """What a run of each arm of a task costs over one of plain training, as it was measured last."""
    found: dict[str, float] = {}
    for row in file:
        if row["kind"] == "costs" and row["task"] == task:
            found |= row["costs"]
    return found


def _task(protocol: Protocol, stage: Stage, task: Task, arms: Sequence[Arm], file: ResultsFile) -> None:
    seeds = protocol.seeds(stage, task)
    examples = task.examples()
    priced = costs(file, task.name)
    if missing := [arm for arm in arms if arm.name not in priced]:
        priced |= race.costs(task, examples, missing)
        file.add({"kind": "costs", "task": task.name, "costs": priced})
    done = {(row["arm"], row["budget"]) for row in file if row["task"] == task.name and row["kind"] == "arm"}
    jobs = [(arm, "steps", task.steps) for arm in arms if (arm.name, "steps") not in done]
    if stage != "search":
        timed = [arm for arm in arms if arm.takes_longer and (arm.name, "time") not in done]
        jobs += [(arm, "time", round(task.steps / priced[arm.name])) for arm in timed]
    counted = any(row["kind"] == "stuck" and row["task"] == task.name for row in file)
    if not jobs and counted:
        return
    start = race.begin(task, examples, seeds)
    if not counted:
        file.add({"kind": "stuck", "task": task.name, "seeds": seeds, **race.stuck_at(start, examples)})
    for team in _teams(jobs, 1 if task.at_once == 1 else max(1, ROWS // len(seeds))):
        _, budget, steps = team[0]
        racing = [arm for arm, _, _ in team]
        found = race.run(task, examples, start, racing, seeds, steps, protocol.decay)
        for arm in racing:
            about = {"kind": "arm", "task": task.name, "arm": arm.name, "family": arm.family, "budget": budget}
            length = {"train1": task.train1, "steps": steps, "seeds": seeds, "at_start": start.losses[-1].tolist()}
            row = (
                found[arm.name] if budget == "steps" else _with_what_cost_nothing(file, task.name, found[arm.name], arm)
            )
            file.add({**about, **length, **row})


def _with_what_cost_nothing(file: ResultsFile, task: str, found: dict[str, Any], arm: Arm) -> dict[str, Any]:
    """A run with equal time, in which seeds that were not bypassed, and cost no more than plain training, take all steps."""
    whole = next(
        row
        for row in file
        if row["kind"] == "arm" and (row["task"], row["arm"], row["budget"]) == (task, arm.name, "steps")
    )
    for name in ("loss", "test_loss", "test_accuracy"):
        if name in found:
            found[name] = [
                whole[name][seed] if seed in found["not_bypassed"] else value for seed, value in enumerate(found[name])
            ]
    return found


def _teams(jobs: Sequence[tuple[Arm, str, int]], size: int) -> Iterator[list[tuple[Arm, str, int]]]:
    """Arms that race side by side: those of as many steps, and of as many gradients a step."""

    def alike(job: tuple[Arm, str, int]) -> tuple[Any, ...]:
        arm, budget, steps = job
        return bool(arm.sam), budget, steps

    for _, group in groupby(sorted(jobs, key=alike), key=alike):
        members = list(group)
        for first in range(0, len(members), size):
            yield members[first : first + size]
