"""Numbers of a step on their way from the device to the host, without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """The numbers of one step, and which step that was; `measured` where they are the sites' norms."""

    phase: str
    step: int
    measured: bool
    numbers: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    """Numbers on the host, or on their way there until the event has come."""

    host: Tensor | Sequence[float]
    event: torch.cuda.Event | None = None

    def numbers(self) -> tuple[float, ...]:
        """The numbers, waited for."""
        if self.event is not None:
            self.event.synchronize()
        return tuple(self.host.tolist() if isinstance(self.host, Tensor) else self.host)


def send(numbers: Tensor) -> Sent:
    """Copy numbers to the host; from a GPU to pinned memory, beside the computation."""
    if not numbers.is_cuda:
        return Sent(numbers.tolist())
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(numbers.device))
    return Sent(host, event)


def send_rows(numbers: Tensor) -> list[Sent]:
    """The same with the rows of a matrix, [rows, k]: each for another readout, copied together."""
    sent = send(numbers)
    return [Sent(row, sent.event) for row in sent.host]  # type: ignore[arg-type]


def delays(device: torch.device) -> bool:
    """Whether the host would wait for a number from there, and so takes it a step later."""
    return device.type == "cuda"


class Readout:
    """Takes in the numbers of every step, and gives out those that have come.

    On a GPU they come out when the next step's go in: by then they are there. Elsewhere they come out at once.

    Example:
        >>> readout = Readout(torch.device("cpu"))
        >>> readout.exchange(send(torch.tensor([0.5, 2.0])), "opt2", 1, True).numbers
        (0.5, 2.0)
    """

    def __init__(self, device: torch.device) -> None:
        self.delays = delays(device)
        self._under_way: tuple[Sent, str, int, bool] | None = None

    def exchange(self, numbers: Sent, phase: str, step: int, measured: bool) -> Reading | None:
        """Hand in a step's numbers, and take those that have come: on a GPU, the ones of the step before."""
        if not self.delays:
            return Reading(phase, step, measured, numbers.numbers())
        earlier = self.flush()
        self._under_way = numbers, phase, step, measured
        return earlier

    def flush(self) -> Reading | None:
        """What is under way, waited for."""
        if self._under_way is None:
            return None
        sent, phase, step, measured = self._under_way
        self._under_way = None
        return Reading(phase, step, measured, sent.numbers())

    def state_dict(self) -> dict[str, Any] | None:
        """What is under way, which stays so."""
        reading = self.flush()
        if reading is None:
            return None
        self._put_back(reading)
        return asdict(reading)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up what `state_dict` gave."""
        if state is not None:
            self._put_back(Reading(**{**state, "numbers": tuple(state["numbers"])}))

    def _put_back(self, reading: Reading) -> None:
        self._under_way = Sent(reading.numbers), reading.phase, reading.step, reading.measured
