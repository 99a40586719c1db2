"""What returns that follow a planned path have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Comeback, Moment
from .paths import Descent


class Planned(Comeback):
    """Leads each site's residual, and the pace of the optimiser, along c(t); a part of the budget may come before that."""

    def __init__(self, descent: Descent) -> None:
        self._descent = descent

    @property
    def ends(self) -> bool:
        return self._descent.share > 0

    def pace(self, t: int, budget: int) -> float:
        return self._descent.at(t, budget)

    def shrink(self, now: Moment) -> Tensor | None:
        return torch.full_like(now.norms, self._descent.factor(now.t, now.budget))
