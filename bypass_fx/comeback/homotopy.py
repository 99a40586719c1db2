"""The homotopy from ψ back to σ."""

from __future__ import annotations

from collections.abc import Hashable

from .paths import Descent
from .planned import Planned


class Homotopy(Planned):
    """D = c(t) E, where the optimiser walks in E and c leads along a planned path from c(0) = 1 to c(T) = 0.

    That is, D moves with c(t) times its learning rate, and after each optimiser step D ← D · c(t+1) / c(t): a homotopy
    from ψ back to σ. Without the first, the last step would cut off a whole optimiser step of D.
    Ends at D = 0, always, T steps after its start at the latest (a site whose norm falls below ε goes home earlier).

    Args:
        path: "smooth", "cosine" or "linear", see `Descent`.

    Raises:
        BypassError: the path is unknown.

    Example:
        >>> import torch
        >>> from bypass_fx.comeback import Moment
        >>> moment = Moment(torch.ones(1), gamma=torch.zeros(()), t=8, budget=10, lr=0.1)
        >>> Homotopy("linear").shrink(moment)  # from 2/10 to 1/10
        tensor([0.5000])
    """

    name = "homotopy"
    may_skip = True
    every = 8  # its way goes by no norm; that a site is within ε shows a few steps later

    def __init__(self, path: str = "smooth") -> None:
        super().__init__(Descent(path))

    def alike(self) -> Hashable | None:
        return (Homotopy, self._descent) if type(self) is Homotopy else None  # a class of the user's may hold more
