"""A stretch of training that is saved every few minutes: one that was stopped goes on from there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bypass_fx.checkpoint import Checkpoints

from .experiment import Experiment

RUNS = Path(__file__).parents[1] / "runs"
EVERY = 300.0  # seconds
State = dict[str, Any]


class Saved:
    """Where one stretch of an experiment, "start" or "seeds", keeps how far it has come with some seeds.

    What was saved of the same stretch with other numbers, with other seeds or of other data, is passed over.
    """

    def __init__(self, experiment: Experiment, stretch: str, seeds: Sequence[int]) -> None:
        which = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}, {len(seeds)}"
        self._folder = RUNS / f"{experiment.name} {experiment.length}" / f"{stretch} {which}"
        self._checkpoints = Checkpoints(self._folder, keep=1)
        self._of = repr((experiment, [*seeds]))
        self._at = time.monotonic()

    def load(self) -> tuple[int, State] | None:
        """The step that was saved last, and the state after it."""
        step, kept = self._checkpoints.newest() or (0, {"of": None})
        return (step, kept["state"]) if kept["of"] == self._of else None

    def offer(self, step: int, state: Callable[[], State]) -> None:
        """Save, if the last time is long enough ago."""
        if time.monotonic() - self._at >= EVERY:
            self.save(step, state())

    def save(self, step: int, state: State) -> None:
        """Save now."""
        self._checkpoints.save(step, {"of": self._of, "state": state})
        self._at = time.monotonic()

    def remove(self) -> None:
        """It is in the results."""
        shutil.rmtree(self._folder, ignore_errors=True)
