"""When train1 has slowed down enough to be called θ*."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Plateau:
    """Says when the mean training loss of an epoch has not fallen below its best for `patience` epochs.

    An epoch counts as better only where it is lower than the best by the share `tolerance`.

    Example:
        >>> plateau = Plateau(patience=2, tolerance=0.01)
        >>> [plateau.epoch_over(loss) for loss in (1.0, 0.5, 0.499, 0.4, 0.399, 0.398)]
        [False, False, False, False, False, True]
    """

    def __init__(self, patience: int, tolerance: float) -> None:
        self._patience, self._tolerance = patience, tolerance
        self.best, self.waited = math.inf, 0
        self.sum: Tensor | float = 0.0  # of the losses of this epoch's steps
        self.reached = False

    def note(self, loss: Tensor) -> None:
        """Count a step's loss in; it stays on its device."""
        self.sum = self.sum + loss.to(torch.float64)

    def epoch_over(self, loss: float) -> bool:
        """Judge an epoch by its mean loss; whether the plateau is reached."""
        self.sum = 0.0
        better = not math.isfinite(self.best) or loss < self.best - self._tolerance * abs(self.best)
        self.best, self.waited = (loss, 0) if better else (self.best, self.waited + 1)
        self.reached = 0 < self._patience <= self.waited
        return self.reached

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered to go on exactly."""
        return {"best": self.best, "waited": self.waited, "sum": float(self.sum), "reached": self.reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.best, self.waited, self.sum, self.reached = (state[key] for key in ("best", "waited", "sum", "reached"))
