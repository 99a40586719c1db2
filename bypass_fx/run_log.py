"""Gathers the losses of a run's steps into records, and keeps records and moments in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bypass_fx.history import Event, Geometry, Moment, Phase, Record, from_row, to_row
from bypass_fx.passes.errors import BypassError

RECORDS = 2000  # a run keeps about this many records, however many steps it has
STEPS_PER_RECORD = 50  # within a long epoch, so that progress can be seen


class TrainingError(BypassError):
    """The loss stopped being finite."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Both arms' losses in one step, on their device still."""

    step: int
    phase: Phase
    loss: Tensor
    baseline: Tensor | None


class RunLog:
    """The records, moments and evaluations of a run; losses are brought to the host when a record is due, not before."""

    def __init__(self, on_event: Callable[[Event], None], total_steps: int, epoch_steps: int) -> None:
        self.records: list[Record] = []
        self.moments: list[Moment] = []
        self.evaluations: list[Moment] = []
        self._on_event = on_event
        self._epoch_steps = epoch_steps
        self._every = max(math.ceil(total_steps / RECORDS), min(epoch_steps, STEPS_PER_RECORD))
        self._started = time.perf_counter()
        self._pending: list[Losses] = []

    @property
    def next_is_due(self) -> bool:
        """Whether a record is due after one more step."""
        return len(self._pending) + 1 >= self._every

    @property
    def is_pending(self) -> bool:
        """Whether there are steps in no record yet."""
        return bool(self._pending)

    def seconds(self) -> float:
        """Seconds that the run took, those before an interruption included."""
        return time.perf_counter() - self._started

    def note(self, losses: Losses) -> None:
        """Count one step in."""
        self._pending.append(losses)

    def record(
        self,
        mean: Callable[[Tensor], Tensor],
        residuals: Mapping[str, float] | None = None,
        out: int | None = None,
        cycle: int = 0,
        lr: float | None = None,
        geometry: Geometry | None = None,
    ) -> None:
        """Close the record under way; `mean` is the mean over the processes.

        Raises:
            TrainingError: a loss is not finite; names the arm, the phase, the epoch and the step.
        """
        losses, baselines = self._read(mean)
        last = self._pending[-1]
        baseline = fmean(baselines) if baselines else None
        residual = None if residuals is None else sum(residuals.values())
        made = Record(
            last.step, last.step / self._epoch_steps, last.phase, fmean(losses), baseline, residual, self.seconds(),
            cycle, out, lr, geometry, residuals,
        )  # fmt: skip
        self.records.append(made)
        self._pending.clear()
        self._on_event(made)

    def moment(self, moment: Moment) -> None:
        """Note a moment, or an evaluation between the moments."""
        self._keep(moment)
        self._on_event(moment)

    def _keep(self, moment: Moment) -> None:
        (self.evaluations if moment.name == "evaluation" else self.moments).append(moment)

    def state_dict(self, mean: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What must be remembered to go on exactly."""
        losses, baselines = self._read(mean) if self._pending else ([], [])
        others = [*[None] * (len(losses) - len(baselines)), *baselines]
        return {
            "events": [*map(to_row, self.records), *map(to_row, [*self.moments, *self.evaluations])],
            "pending": [
                [noted.step, noted.phase, loss, other]
                for noted, loss, other in zip(self._pending, losses, others, strict=True)
            ],
            "seconds": self.seconds(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take up what `state_dict` gave."""
        for event in map(from_row, state["events"]):
            if isinstance(event, Record):
                self.records.append(event)
            else:
                self._keep(event)

        def tensor(value: float | None) -> Tensor | None:
            return None if value is None else torch.tensor(value, dtype=torch.float64, device=device)

        for step, phase, loss, other in state["pending"]:
            kept = tensor(loss)
            assert kept is not None
            self._pending.append(Losses(step, phase, kept, tensor(other)))
        self._started = time.perf_counter() - state["seconds"]

    def _read(self, mean: Callable[[Tensor], Tensor]) -> tuple[list[float], list[float]]:
        """The losses under way, over all processes."""
        losses = self._finite("bypass", [noted.loss for noted in self._pending], mean)
        with_baseline = [noted.baseline for noted in self._pending if noted.baseline is not None]
        return losses, self._finite("baseline", with_baseline, mean)

    def _finite(self, arm: str, losses: list[Tensor], mean: Callable[[Tensor], Tensor]) -> list[float]:
        if not losses:
            return []
        values: list[float] = mean(torch.stack([loss.to(torch.float64) for loss in losses])).tolist()
        for noted, value in zip(self._pending[len(self._pending) - len(values) :], values, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss of the {arm} became {value} in {where(noted.phase, noted.step, self._epoch_steps)}; "
                    "lower the learning rate (lr, return_lr) or look for broken values in the data"
                )
        return values


def foreign(error: Exception, what: str) -> TrainingError:
    """What a model or a loss raised, in one line after what it was raised in.

    Example:
        >>> foreign(ValueError("two\\nlines"), "the bypass failed in opt1")
        TrainingError('the bypass failed in opt1: ValueError: two lines')
    """
    hint = "; labels must lie below the model's outputs" if isinstance(error, IndexError) else ""
    return TrainingError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}{hint}")


def where(phase: Phase, step: int, epoch_steps: int) -> str:
    """A step of a run as messages name it.

    Example:
        >>> where("opt1", 11, 5)
        'opt1, epoch 3, step 11'
    """
    return f"{phase}, epoch {math.ceil(step / epoch_steps)}, step {step}"
