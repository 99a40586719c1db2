"""What a training run leaves behind, as plain data: records along the way, scores at its moments, and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from bypass_fx.passes.plan import Plan

if TYPE_CHECKING:
    from bypass_fx.schedule import ScheduleReport

Phase = Literal["train1", "opt1", "opt2", "train3"]
# The phase that begins at a moment.
_BEGINS: dict[str, Phase] = {
    "θ*": "opt1", "after opt1": "opt2", "after proj": "train3", "rolled back": "train3", "nothing stuck": "train3",
}  # fmt: skip
_ENDS = ("end", "baseline kept")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the parameters are, seen from θ*, in the extended space (Fig. 3c, 3d and 5 of the paper).

    `step` is ‖ω_{t+1} − ω_t‖ and `distance` ‖θ* − ω_t‖; `cosine` is that of ∠θ*Oω_t. The same of the baseline's θ_t;
    `relative` is the cosine of ∠θ_t θ* ω_t. None where there is no baseline, or an angle has no legs.
    """

    step: float
    distance: float
    cosine: float | None
    baseline_step: float | None = None
    baseline_distance: float | None = None
    baseline_cosine: float | None = None
    relative: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """The mean training loss of both arms over the steps since the record before, up to `step`.

    `residual` is the sum over the sites of ‖ADW‖ or ‖D‖ at that step, `out` how many have not arrived. `baseline` is
    None in train1, where there is one arm only; `residual` and `out` are None outside opt1 and opt2. `cycle` counts the
    bypasses from 1, 0 in train1. `seconds` counts from the start of the run. `residuals`
    holds the terms of `residual` by the names of the sites.
    """

    step: int
    epoch: float
    phase: Phase
    loss: float
    baseline: float | None
    residual: float | None
    seconds: float
    cycle: int = 0
    out: int | None = None
    lr: float | None = None
    geometry: Geometry | None = None
    residuals: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Loss and metrics over the whole training and test set, in evaluation mode: {"loss": ..., "accuracy": ...}, say."""

    train: Mapping[str, float]
    test: Mapping[str, float]

    @property
    def train_loss(self) -> float:
        """The loss over the training set."""
        return self.train["loss"]

    @property
    def test_loss(self) -> float:
        """The loss over the test set."""
        return self.test["loss"]

    def flat(self) -> dict[str, float]:
        """All numbers in one mapping: "train_loss", "test_accuracy" and so on."""
        return {f"{part}_{name}": value for part in ("train", "test") for name, value in getattr(self, part).items()}


@dataclass(frozen=True, slots=True)
class Moment:
    """Both arms' scores at one step: at "θ*", "after opt1", "after proj" and at the "end"; or an "evaluation" between.

    "rolled back" is where a bypass was undone, in whatever phase; train3 goes on from its θ*, as it does at "nothing
    stuck", where none was begun. Of the bypasses after the first, `cycle` counts which; there "θ*" is where the next one
    starts. "baseline kept" follows the end, where the model became the baseline's.
    """

    name: str
    step: int
    bypass: Score
    baseline: Score | None
    cycle: int = 1

    @property
    def title(self) -> str:
        """The name, with the number of the bypass from the second one on."""
        return f"{self.name} ({self.cycle})" if self.cycle > 1 and self.name not in _ENDS else self.name


Event = Record | Moment


@dataclass(frozen=True, slots=True)
class History:
    """A finished run: what was planned, how the returns went, the records, the moments and the evaluations between."""

    plan: Plan
    reports: tuple[ScheduleReport, ...]
    records: tuple[Record, ...]
    moments: tuple[Moment, ...]
    steps_per_epoch: int
    seconds: float
    evaluations: tuple[Moment, ...] = ()

    def moment(self, name: str) -> Moment:
        """The moment of that name or title.

        Raises:
            KeyError: the run has no such moment.
        """
        for moment in self.moments:
            if moment.title == name:
                return moment
        raise KeyError(name)

    def spans(self) -> list[tuple[Phase, int, int]]:
        """Each phase that the run went through with its first and last step, read off the moments."""
        return spans(self.moments)


def spans(moments: tuple[Moment, ...]) -> list[tuple[Phase, int, int]]:
    """Each phase with its first and last step: a moment ends the phase before it, and begins another."""
    found: list[tuple[Phase, int, int]] = []
    phase: Phase = "train1"
    start = 0
    for moment in moments:
        if moment.step > start:
            goes_on = found.pop() if found and found[-1][0] == phase else None
            found.append((phase, goes_on[1] if goes_on else start, moment.step))
        phase, start = _BEGINS.get(moment.name, phase), moment.step
    return found


def to_row(event: Event) -> dict[str, Any]:
    """An event as a row of `history.jsonl`."""
    return {"kind": "record" if isinstance(event, Record) else "moment", **asdict(event)}


def from_row(row: Mapping[str, Any]) -> Event:
    """An event from a row of `history.jsonl`.

    Raises:
        KeyError, TypeError: it is no such row.
    """
    if row["kind"] == "record":
        known = {field.name for field in fields(Record)}
        values = {name: value for name, value in row.items() if name in known}
        if values.get("geometry"):
            values["geometry"] = Geometry(**values["geometry"])
        return Record(**values)
    bypass, baseline = (row[arm] and Score(**row[arm]) for arm in ("bypass", "baseline"))
    return Moment(row["name"], row["step"], bypass, baseline, row["cycle"])
