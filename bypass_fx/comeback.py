"""The ways back to the original architecture: what opt2 adds to the loss, and what it does to D after each step.

A return is one small class: `penalty` is added to the user's loss, `pace` is a factor on D's learning rate, and
`shrink` gives the factor by which each D is scaled after the optimiser's step. Every site's norm is linear in D, so
‖A(cD)W‖ = c‖ADW‖ and no second evaluation is needed. A return that keeps numbers of its own (multipliers, say) hands
them out in `state_dict`. Enter it in `COMEBACKS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bypass_fx import constraint
from bypass_fx.nearest import did_you_mean
from bypass_fx.passes.errors import BypassError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Moment:
    """The moment after an optimiser step of opt2, as a return sees it.

    `norms` holds one norm per site, [sites], before any shrinking and 0 where a site has arrived; `t` counts the
    earlier steps of opt2, of which `budget` are planned; `gamma` is γ(t), 0-dim; `lr` is λ', D's learning rate.
    """

    norms: Tensor
    gamma: Tensor
    t: int
    budget: int
    lr: float | Tensor


class Comeback:
    """A return that does nothing; the base of those that do."""

    name: ClassVar[str]
    uses_gamma: ClassVar[bool] = False

    def penalty(self, model: nn.Module, out: frozenset[str], gamma: Tensor) -> Tensor | None:
        """What is added to the loss while the sites in `out` are out: a differentiable 0-dim tensor, or None."""
        return None

    def pace(self, t: int, budget: int) -> float:
        """The factor on D's learning rate in step `t` of opt2, beside λ'."""
        return 1.0

    def shrink(self, now: Moment) -> Tensor | None:
        """The factor on each site's D after an optimiser step, [sites], None where D stays as the optimiser left it."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What this return must remember to go on exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class Penalty(Comeback):
    """The paper's return: the loss becomes L₂ + γ(t) Σ‖ADW‖ (eq. 17, Algorithm 1, lines 6-10).

    Ends at ADW = 0 with D ≠ 0 on strict sites and at D = 0 on relaxed ones, if it ends: the norm has a kink at 0, so a
    fixed learning rate steps over it by about λ'γ(t), and the norm may idle above ε for ever.
    """

    name = "penalty"
    uses_gamma = True

    def penalty(self, model: nn.Module, out: frozenset[str], gamma: Tensor) -> Tensor:
        # Sites that arrived add 0 with a gradient of 0. A compiled loss takes them along rather than recompile.
        return gamma * constraint.penalty(model, out=None if torch.compiler.is_compiling() else out)


class Proximal(Comeback):
    """The penalty of eq. 17 taken as a proximal step in D: D ← D · max(0, 1 − λ'γ(t)/‖ADW‖) after each optimiser step.

    The norm falls by exactly λ'γ(t) and stops at 0, without overshoot. Ends at D = 0; a strict site may come within ε
    of ADW = 0 with D ≠ 0 before that, where A and W lead there.
    """

    name = "proximal"
    uses_gamma = True

    def shrink(self, now: Moment) -> Tensor:
        fall = now.lr * now.gamma
        return torch.where(now.norms > fall, 1 - fall / now.norms, torch.zeros_like(now.norms))


# c as a function of u = 1 − t/T, the part of the way that is left, so that nothing cancels as u nears 0.
PATHS: dict[str, Callable[[float], float]] = {
    "smooth": lambda u: u**3 * (10 - 15 * u + 6 * u**2),
    "cosine": lambda u: math.sin(math.pi * u / 2) ** 2,
    "linear": lambda u: u,
}


class Homotopy(Comeback):
    """D = c(t) E, where the optimiser walks in E and c leads along a planned path from c(0) = 1 to c(T) = 0.

    That is, D moves with c(t) times its learning rate, and after each optimiser step D ← D · c(t+1) / c(t): a homotopy
    from ψ back to σ. Without the first, the last step would cut off a whole optimiser step of D.
    Ends at D = 0, always, T steps after its start at the latest (a site whose norm falls below ε goes home earlier).

    Args:
        path: with u = 1 − t/T, "smooth", c = u³(10 − 15u + 6u²), whose last steps are the smallest, of the size T⁻³;
            "cosine", c = sin²(πu/2); or "linear", c = u.

    Raises:
        BypassError: the path is unknown.

    Example:
        >>> moment = Moment(torch.ones(1), gamma=torch.zeros(()), t=8, budget=10, lr=0.1)
        >>> Homotopy("linear").shrink(moment)  # from 2/10 to 1/10
        tensor([0.5000])
    """

    name = "homotopy"

    def __init__(self, path: str = "smooth") -> None:
        self._path = _named(path, PATHS, "path")

    def pace(self, t: int, budget: int) -> float:
        return self._path(max(0, budget - t) / budget)

    def shrink(self, now: Moment) -> Tensor:
        now_at, next_at = self.pace(now.t, now.budget), self.pace(now.t + 1, now.budget)
        return torch.full_like(now.norms, next_at / now_at if next_at > 0 else 0.0)


COMEBACKS: dict[str, Callable[[], Comeback]] = {kind.name: kind for kind in (Penalty, Proximal, Homotopy)}


def resolve(comeback: str | Comeback) -> Comeback:
    """The return of that name, or the given one.

    Raises:
        BypassError: there is no return of that name.

    Example:
        >>> resolve("homotopy").name
        'homotopy'
    """
    return comeback if isinstance(comeback, Comeback) else _named(comeback, COMEBACKS, "comeback")()


def _named(name: str, table: Mapping[str, T], what: str) -> T:
    if isinstance(name, str) and name in table:
        return table[name]
    hint = did_you_mean(str(name), table, "give one of the known names")
    raise BypassError(f"unknown {what} {name!r}; {hint} ({', '.join(table)})")
