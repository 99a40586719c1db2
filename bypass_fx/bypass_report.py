"""How a bypass went, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from bypass_fx.passes.errors import BypassError


class NonFiniteError(BypassError):
    """The loss, a parameter, D or its norm became NaN or infinite during a bypass."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A site that was projected: after which step of opt2, how far from its constraint it was (‖ADW‖ or ‖D‖), and ‖D‖."""

    site: str
    step: int
    norm: float
    delta: float = 0.0


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """How a bypass went: its steps, the sites that arrived, and those that were contracted while still out.

    `rolled_back` says why the model is at θ* again, and is "" where it is not; `notes` holds what else is worth knowing.
    """

    comeback: str
    opt1_steps: int
    opt2_steps: int
    arrivals: tuple[Arrival, ...]
    left_out: tuple[Arrival, ...] = ()
    rolled_back: str = ""
    notes: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The report as plain containers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The report that `state_dict` gave."""
        arrivals, left_out = (tuple(Arrival(**entry) for entry in state[key]) for key in ("arrivals", "left_out"))
        return cls(**{**state, "arrivals": arrivals, "left_out": left_out, "notes": tuple(state["notes"])})
