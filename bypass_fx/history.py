"""What a training run leaves behind, as plain data: records along the way, scores at its moments, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bypass_fx.passes.plan import Plan

if TYPE_CHECKING:
    from bypass_fx.schedule import ScheduleReport

Phase = Literal["train1", "opt1", "opt2", "train3"]
PHASES: tuple[Phase, ...] = ("train1", "opt1", "opt2", "train3")


@dataclass(frozen=True, slots=True)
class Record:
    """The mean training loss of both arms over the steps since the record before, up to `step`.

    `residual` is the sum over the sites of ‖ADW‖ or ‖D‖ at that step. `baseline` is None in train1, where there is one
    arm only; `residual` is None outside opt1 and opt2. `seconds` counts from the start of the run. `residuals` holds the
    terms of `residual` by the names of the sites.
    """

    step: int
    epoch: float
    phase: Phase
    loss: float
    baseline: float | None
    residual: float | None
    seconds: float
    residuals: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Loss and accuracy over the whole training and test set, in evaluation mode; accuracy is None in a regression."""

    train_loss: float
    test_loss: float
    train_accuracy: float | None
    test_accuracy: float | None


@dataclass(frozen=True, slots=True)
class Moment:
    """Both arms' scores at one step: at "θ*", "after opt1", "after proj" and at the "end"."""

    name: str
    step: int
    bypass: Score
    baseline: Score


Event = Record | Moment


@dataclass(frozen=True, slots=True)
class History:
    """A finished run: what was planned, how the return went, the records and the moments."""

    plan: Plan
    report: ScheduleReport
    records: tuple[Record, ...]
    moments: tuple[Moment, ...]
    steps_per_epoch: int
    seconds: float

    def moment(self, name: str) -> Moment:
        """The moment of that name.

        Raises:
            KeyError: the run has no such moment.
        """
        for moment in self.moments:
            if moment.name == name:
                return moment
        raise KeyError(name)

    def spans(self) -> dict[Phase, tuple[int, int]]:
        """First and last step of each phase that the run went through, read off the moments."""
        ends = {"train1": "θ*", "opt1": "after opt1", "opt2": "after proj", "train3": "end"}
        spans: dict[Phase, tuple[int, int]] = {}
        start = 0
        for phase in PHASES:
            stop = self.moment(ends[phase]).step
            if stop > start:
                spans[phase] = (start, stop)
            start = stop
        return spans
