"""What is looked at of a bypass's steps: the norms of its sites, and whether all that moves is finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import gradient_averaging
from bypass_fx.bypass_report import NonFiniteError
from bypass_fx.moving import Moving
from bypass_fx.readout import Reading, Readout


@dataclass(frozen=True, slots=True)
class Seen:
    """What a step goes by, measured after the optimiser's step by one who leads several models at once.

    `values` is what `Bypass.look` gives, [sites]; `extent` the norm of the parameters that move beside D, 0-dim.
    """

    values: Tensor
    extent: Tensor


class Lookout:
    """Takes in what a step is to be judged by, and gives out the norms that have come to the host.

    Args:
        model, optimizer, deltas, like: as for `Moving`.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, deltas: Mapping[str, nn.Parameter], like: Tensor
    ) -> None:
        self._names, self._like = [*deltas], like
        self._moving = Moving(model, optimizer, deltas, like)
        self._losses = torch.zeros_like(like)  # those since the last look, added up: NaN where one is not finite
        self._readout = Readout(like.device)

    def exchange(
        self, phase: str, step: int, norms: Tensor | None, loss: Tensor | float | None, seen: Seen | None, looks: bool
    ) -> dict[str, float] | None:
        """One number per site on its way to the host, with a look at all that moves; norms that have come, by site.

        Args:
            phase, step: of the bypass.
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
            own = loss.detach().to(self._like, non_blocking=True).reshape(()) if isinstance(loss, Tensor) else loss
            self._losses += own
        if norms is None and not looks:
            return self.flush()
        parts = [] if norms is None else [norms]
        if looks and seen:
            parts += [*([seen.values] if norms is None else []), seen.extent.to(self._like).reshape(1)]
        elif looks:
            parts.append(self._moving.sizes(with_d=norms is None))
        numbers = torch.cat([*parts, self._losses.reshape(1)])
        self._losses.zero_()
        return self._looked_at(self._readout.exchange(numbers, phase, step, norms is not None))

    def flush(self) -> dict[str, float] | None:
        """What is under way, waited for: the norms by site, if they are norms.

        Raises:
            NonFiniteError: as `exchange`.
        """
        return self._looked_at(self._readout.flush())

    def _looked_at(self, reading: Reading | None) -> dict[str, float] | None:
        if reading is None:
            return None
        by_name = dict(zip(self._names, reading.numbers, strict=False))  # behind them are those of what else moves
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

    def state_dict(self) -> dict[str, Any] | None:
        """What is under way, which stays so."""
        return self._readout.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up what `state_dict` gave."""
        self._readout.load_state_dict(state)
