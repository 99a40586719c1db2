"""The paper's return, and what becomes of it when it idles."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx import constraint
from bypass_fx.numeric import is_count
from bypass_fx.passes.errors import BypassError

from .base import Comeback, Moment
from .proximal import Proximal

_FALLEN = 0.5  # the norm counts as falling once it was below this part of its highest: at first γ is too small
_STILL_FALLS = 0.99  # between the means of two windows
_FEWEST = 3  # norms in a window, where they are not taken in every step
_LAST_PART = 0.75  # of the budget: from here on a guaranteed return needs the rest


class Penalty(Comeback):
    """The paper's return: the loss becomes L₂ + γ(t) Σ‖ADW‖ (eq. 17, Algorithm 1, lines 6-10).

    Ends at ADW = 0 with D ≠ 0 on strict sites and at D = 0 on relaxed ones, if it ends: the norm has a kink at 0, so a
    fixed learning rate steps over it by about λ'γ(t), and the norm may idle above ε for ever. It idles where the mean
    over a window of steps is no longer below that of the window before, once the norm had fallen to half of its
    highest: a warning says so once, and the report. Then, or where three quarters of the budget are gone with sites
    still out, it hands over to `Proximal`, which ends on time at D = 0.

    Args:
        hand_over: False stays with the penalty whatever happens, as published.
        window: steps of a window; None takes a twentieth of the budget, at least 10.

    Raises:
        BypassError: the window is no number of steps.
    """

    name = "penalty"
    may_skip = True
    uses_gamma = True

    def __init__(self, hand_over: bool = True, window: int | None = None) -> None:
        if not (window is None or is_count(window, 1)):
            raise BypassError(f"Penalty got window={window!r}; give a number of steps, 1 or more, or None")
        self._hand_over, self._window = hand_over, window
        self._proximal = Proximal()
        self._on = torch.ones(())  # 1, and 0 after the hand-over: a number, so that a compiled loss stays as it is
        self._forget()

    def _forget(self) -> None:
        self._handed_over = False
        self._note = ""
        self._highest = 0.0
        self._earlier: float | None = None  # the mean of the window before
        self._sum, self._count = 0.0, 0
        self._since = 0  # the first step of this window

    @property
    def ends(self) -> bool:
        return self._handed_over

    def begin(self, model: nn.Module) -> None:
        self._forget()
        self._on = torch.ones((), device=next(model.parameters()).device)

    def penalty(self, model: nn.Module, out: frozenset[str], gamma: Tensor) -> Tensor | None:
        # Sites that arrived add 0 with a gradient of 0. A compiled loss takes them along rather than recompile.
        if torch.compiler.is_compiling():
            return self._on * gamma * constraint.penalty(model)
        return None if self._handed_over else gamma * constraint.penalty(model, out=out)

    def alike(self) -> Hashable | None:
        own = type(self) is not Penalty  # a class of the user's may hold more
        return None if own or self._handed_over else Penalty

    def pace(self, t: int, budget: int) -> float:
        return self._proximal.pace(t, budget) if self._handed_over else 1.0

    def observe(self, model: nn.Module, now: Moment) -> None:
        if self._handed_over or not now.last:
            return
        reason = self._stuck(sum(now.last.values()), now)
        if reason and not self._note:
            self._note = f"penalty: after {now.t} steps of opt2 {reason}"
            if self._hand_over:
                self._note += "; it handed over to the proximal return"
            warnings.warn(self._note, stacklevel=8)  # the line that calls `BypassSchedule.step`
        if reason and self._hand_over:
            self._handed_over = True
            self._on.zero_()

    def _stuck(self, norm: float, now: Moment) -> str:
        """Why the penalty won't arrive on time; "" while it may."""
        self._highest = max(self._highest, norm)
        self._sum, self._count = self._sum + norm, self._count + 1
        if now.t + 1 - self._since >= (self._window or max(10, now.budget // 20)) and self._count >= _FEWEST:
            mean, earlier = self._sum / self._count, self._earlier
            self._earlier, self._sum, self._count, self._since = mean, 0.0, 0, now.t + 1
            if earlier is not None and earlier < _FALLEN * self._highest and mean > _STILL_FALLS * earlier:
                return f"the norm idles at {mean:.3g} while γ grows"
        if self._hand_over and _LAST_PART * now.budget <= now.t < now.budget:
            return f"the norm is {norm:.3g} with a quarter of the budget left"
        return ""

    def shrink(self, now: Moment) -> Tensor | None:
        return self._proximal.shrink(now) if self._handed_over else None

    def notes(self) -> tuple[str, ...]:
        return (self._note,) if self._note else ()

    def state_dict(self) -> dict[str, Any]:
        return {
            "handed_over": self._handed_over,
            "note": self._note,
            "highest": self._highest,
            "earlier": self._earlier,
            "window": (self._sum, self._count, self._since),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._handed_over, self._note = state["handed_over"], state["note"]
        self._highest, self._earlier = state["highest"], state["earlier"]
        self._sum, self._count, self._since = state["window"]
        self._on.fill_(0.0 if self._handed_over else 1.0)
