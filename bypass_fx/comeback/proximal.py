"""The penalty as a proximal step in D."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from .base import Moment
from .paths import Descent
from .planned import Planned


class Proximal(Planned):
    """The penalty of eq. 17 taken as a proximal step in D: D ← D · max(0, 1 − λ'γ(t)/‖ADW‖) after each optimiser step.

    The norm falls by exactly λ'γ(t) and stops at 0, without overshoot. What is still out when the last part of the
    budget begins follows a homotopy to zero from there, so that it ends on time. Ends at D = 0; a strict site may come
    within ε of ADW = 0 with D ≠ 0 before that, where A and W lead there.

    Args:
        landing: the part of the budget that the homotopy takes; 0 leaves it out, and the return may not end on time.

    Example:
        >>> Proximal().shrink(Moment(torch.tensor([4.0, 0.5]), gamma=torch.tensor(10.0), t=0, budget=10, lr=0.1))
        tensor([0.7500, 0.0000])
    """

    name = "proximal"
    may_skip = True
    uses_gamma = True

    def __init__(self, landing: float = 0.25) -> None:
        super().__init__(Descent(share=landing))

    def alike(self) -> Hashable | None:
        return (Proximal, self._descent) if type(self) is Proximal else None  # a class of the user's may hold more

    def pace(self, t: int, budget: int) -> float:
        return super().pace(t, budget) if t < budget else 1.0

    def shrink(self, now: Moment) -> Tensor:
        fall = now.lr * now.gamma
        nearer = torch.where(now.norms > fall, 1 - fall / now.norms, torch.zeros_like(now.norms))
        return nearer.clamp(max=self._descent.factor(now.t, now.budget))
