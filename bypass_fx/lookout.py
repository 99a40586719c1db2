"""What a bypass looks at after a step: norms, the loss, and whether all that moves is finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bypass_fx import gradient_averaging
from bypass_fx.bypass_report import NonFiniteError
from bypass_fx.moving import Moving
from bypass_fx.readout import Reading, Readout, Sent, send


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step goes by, measured after the optimiser's step by one who leads several models at once.

    `values` is what `Bypass.look` gives, [sites], and `extent` the norm of the parameters that move beside D, 0-dim,
    where the step looks at them. `shrunk` is given where the return has scaled D already: the norms after that, [sites].
    `sent` are the numbers of the step on their way to the host, where they are.
    """

    values: Tensor | None = None
    extent: Tensor | None = None
    shrunk: Tensor | None = None
    sent: Sent | None = None


class Lookout:
    """Brings a number for each site to the host, with the losses and a look at all that moves.

    Args:
        sites: their names.
        moving: what moves.
        like: a number of the dtype and on the device that norms have.
    """

    def __init__(self, sites: Sequence[str], moving: Moving, like: Tensor) -> None:
        self._sites, self._moving = sites, moving
        self.losses = torch.zeros_like(like)  # those since the last look, added up: NaN where one is not finite
        self._readout = Readout(like.device)

    def exchange(
        self, phase: str, step: int, norms: Tensor | None, loss: Tensor | float | None, seen: Seen | None, looks: bool
    ) -> dict[str, float] | None:
        """Hand in what a step gave, and take the norms that have come, by site; on a GPU, those of the step before.

        Args:
            phase: of the step.
            step: its number in the phase.
            norms: of the sites, [sites], where they were taken.
            loss: of the step; one on a GPU, or of one process among several, is seen at the next look.
            seen: what was measured already.
            looks: whether D and what moves beside it are looked at.

        Raises:
            NonFiniteError: a number is NaN or infinite.
        """
        on_host = not isinstance(loss, Tensor) or (loss.device.type == "cpu" and not self._readout.delays)
        if loss is None:
            pass
        elif on_host and not gradient_averaging.among_several():
            if not math.isfinite(loss):
                self._expect_finite({}, float(loss), f"{phase}, step {step}")
        else:  # several processes stop in the same step, or some wait for ever
            own = loss.detach().to(self.losses, non_blocking=True).reshape(()) if isinstance(loss, Tensor) else loss
            self.losses += own
        if norms is None and not looks:
            return self.flush()
        sent = seen.sent if seen else None
        return self._read(
            self._readout.exchange(sent or send(self._numbers(norms, seen, looks)), phase, step, norms is not None)
        )

    def _numbers(self, norms: Tensor | None, seen: Seen | None, looks: bool) -> Tensor:
        parts = [] if norms is None else [norms]
        if looks and seen and seen.values is not None and seen.extent is not None:
            parts += [*([seen.values] if norms is None else []), seen.extent.to(self.losses).reshape(1)]
        elif looks:
            parts.append(self._moving.sizes(with_d=norms is None))
        numbers = torch.cat([*parts, self.losses.reshape(1)])
        self.losses.zero_()
        return numbers

    def flush(self) -> dict[str, float] | None:
        """The norms that are under way, waited for.

        Raises:
            NonFiniteError: as `exchange`.
        """
        return self._read(self._readout.flush())

    def state_dict(self) -> dict[str, Any] | None:
        """What is under way, which stays so."""
        return self._readout.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up what `state_dict` gave."""
        self._readout.load_state_dict(state)

    def _read(self, reading: Reading | None) -> dict[str, float] | None:
        """The norms in a reading, if they are norms."""
        if reading is None:
            return None
        by_name = dict(zip(self._sites, reading.numbers, strict=False))  # behind them are those of what else moves
        if not all(map(math.isfinite, reading.numbers)):
            self._expect_finite(by_name, reading.numbers[-1], f"{reading.phase}, step {reading.step}")
        return by_name if reading.measured else None

    def _expect_finite(self, norms: Mapping[str, float], loss: float, when: str) -> None:
        found = [] if math.isfinite(loss) else [f"the loss is {loss}"]
        sites = [(name, norm) for name, norm in norms.items() if not math.isfinite(norm)]
        found += [f"D of site {name!r} is not finite (norm {norm})" for name, norm in sites[:1]]
        if broken := self._moving.broken():
            found.append(f"{broken} is not finite, and so was its gradient")
        if found:
            raise NonFiniteError(f"{when}: {'; '.join(found)}")
