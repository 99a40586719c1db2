"""Numbers of a step on their way from the device to the host, without making the host wait for the device."""

from __future__ import annotations

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


class Readout:
    """Takes in the numbers of every step, and gives out those that have come.

    On a GPU they are copied to pinned memory beside the computation and come out when the next step's go in: by then
    they are there. Elsewhere they come out at once.

    Example:
        >>> readout = Readout(torch.device("cpu"))
        >>> readout.exchange(torch.tensor([0.5, 2.0]), "opt2", 1, True).numbers
        (0.5, 2.0)
    """

    def __init__(self, device: torch.device) -> None:
        self.delays = device.type == "cuda"
        self._under_way: tuple[Tensor, torch.cuda.Event | None, str, int, bool] | None = None

    def exchange(self, numbers: Tensor, phase: str, step: int, measured: bool) -> Reading | None:
        """Hand in a step's numbers, [k], and take those that have come: on a GPU, the ones of the step before."""
        if not self.delays:
            return Reading(phase, step, measured, tuple(numbers.tolist()))
        earlier = self.flush()
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(numbers.device))
            self._under_way = host, event, phase, step, measured
        else:
            self._under_way = numbers.clone(), None, phase, step, measured
        return earlier

    def flush(self) -> Reading | None:
        """What is under way, waited for."""
        if self._under_way is None:
            return None
        host, event, phase, step, measured = self._under_way
        self._under_way = None
        if event is not None:
            event.synchronize()
        return Reading(phase, step, measured, tuple(host.tolist()))

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
        numbers = torch.tensor(reading.numbers, dtype=torch.float64)
        self._under_way = numbers, None, reading.phase, reading.step, reading.measured
