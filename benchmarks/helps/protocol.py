"""The protocol's numbers, read from `protocol.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .arms import Arm
from .tasks import Task

Stage = Literal["search", "in-sample", "held-out", "fresh", "unseen"]
FILE = Path(__file__).with_name("protocol.toml")


@dataclass(frozen=True, slots=True)
class Protocol:
    """Tasks by name, arms by family, and what holds for all.

    `full` is whether the lengths are the full ones.
    """

    tasks: dict[str, Task]
    plain: tuple[Arm, ...]
    search: tuple[Arm, ...]
    verdict: tuple[Arm, ...]
    decay: float
    search_seed: int
    search_seeds: int
    full: bool

    def of(self, stage: Stage) -> list[Task]:
        """The tasks of a stage."""
        half = "search" if stage == "in-sample" else stage
        return [task for task in self.tasks.values() if task.half == half]

    def arms(self, stage: Stage, task: Task) -> list[Arm]:
        """The arms that race on a task: where it names some, only those."""
        arms = [*self.plain, *(self.search if stage == "search" else self.verdict)]
        return [arm for arm in arms if not task.arms or arm.name in task.arms]

    def seeds(self, stage: Stage, task: Task) -> list[int]:
        """The seeds of a task; the search has its own."""
        if stage == "search":
            return [*range(self.search_seed, self.search_seed + min(task.seeds, self.search_seeds))]
        return [*range(task.seeds)]


def read(full: bool = False, cifar10: str = "", file: Path = FILE) -> Protocol:
    """The protocol, with the full lengths or the short ones; CIFAR-10 is a task of it where a folder is given."""
    given = tomllib.loads(file.read_text())
    tasks = {}
    for name, entry in given["tasks"].items():
        numbers: dict[str, Any] = {key: value for key, value in entry.items() if key != "short"}
        if not full:
            numbers |= entry["short"]
        if numbers["data"]["kind"] == "cifar10":
            numbers["data"]["folder"] = cifar10
        if cifar10 or numbers["data"]["kind"] != "cifar10":
            tasks[name] = Task(name=name, **numbers)
    return Protocol(
        tasks, _arms("plain", given["plain"].items()), _arms("bypass", given["search"].items()),
        _arms("bypass", given["verdict"].items()), given["decay"], given["search_seed"],
        given["search_seeds"], full,
    )  # fmt: skip


def _arms(family: str, entries: Iterable[tuple[str, dict[str, Any]]]) -> tuple[Arm, ...]:
    return tuple(Arm(name, family, **entry) for name, entry in entries)
