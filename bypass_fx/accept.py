"""Conditions on which the outcome of a bypass is kept; where they fail, θ* comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx.numeric import is_count
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.runs import in_eval_mode

Evaluate = Callable[[nn.Module], Any]


class Accept:
    """A condition: `begin` is called at θ*, and `objection` after `after` steps of train3, in the original architecture.

    Args:
        after: steps of train3, 0 or more.

    Raises:
        BypassError: the number of steps is none.
    """

    def __init__(self, after: int = 0) -> None:
        if not is_count(after):
            raise BypassError(f"after is {after!r}; give a number of steps of train3, 0 or more")
        self.after = after

    def begin(self, model: nn.Module) -> None:
        """The bypass begins at this model."""

    def objection(self, model: nn.Module, steps: int) -> str:
        """Why the outcome is not kept, `steps` steps after θ*; "" where it is."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What it must remember to go on exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class Condition(Accept):
    """A condition of one's own: a function of the contracted model that says whether to keep it."""

    def __init__(self, holds: Callable[[nn.Module], Any], after: int = 0) -> None:
        super().__init__(after)
        _expect_function("holds", holds)
        self._holds = holds

    def objection(self, model: nn.Module, steps: int) -> str:
        return "" if self._holds(model) else "accept said no"


class NotWorse(Accept):
    """Keeps the outcome if L(θ) ≤ L(θ*) + tolerance, after some steps of train3.

    Args:
        evaluate: model → loss, a number; called in evaluation mode, without gradients.
        after: steps of train3 before θ is looked at.
        tolerance: how much higher than at θ* the loss may be.

    Raises:
        BypassError: an argument is none of its kind.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> accept = NotWorse(lambda model: model.weight.square().sum())
        >>> accept.begin(model)
        >>> _ = model.weight.detach().mul_(2.0)
        >>> accept.objection(model, steps=30).partition(" is ")[0]
        'the loss'
    """

    def __init__(self, evaluate: Evaluate, after: int = 0, tolerance: float = 0.0) -> None:
        super().__init__(after)
        _expect_function("evaluate", evaluate)
        if not (isinstance(tolerance, float | Real | Tensor) and tolerance == tolerance):
            raise BypassError(f"tolerance is {tolerance!r}; give a number, such as 0.01")
        self._evaluate, self._tolerance = evaluate, float(tolerance)
        self._at_start = math.nan

    def begin(self, model: nn.Module) -> None:
        self._at_start = _loss(self._evaluate, model)

    def objection(self, model: nn.Module, steps: int) -> str:
        loss = _loss(self._evaluate, model)
        if loss <= self._at_start + self._tolerance:  # false where the loss is no number
            return ""
        return f"the loss is {loss:.6g} after {self.after} steps of train3, and was {self._at_start:.6g} at θ*"

    def state_dict(self) -> dict[str, Any]:
        return {"at_start": self._at_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._at_start = state["at_start"]


class BeatsForecast(Accept):
    """Keeps the outcome if its loss is not above what plain training would have reached in the same number of steps.

    The forecast is a power law a·s^(−p) with p ≥ 0, fitted by least squares of the logarithms to the later half of the
    losses before θ*, s counting steps of training.

    Args:
        evaluate: model → loss, as the losses were measured; called in evaluation mode, without gradients.
        losses: losses before θ*, the last one at θ*, evenly spaced; positive, at least 4.
        every: steps between two of them.
        after: steps of train3 before the outcome is looked at.

    Raises:
        BypassError: there are too few losses, one is not positive, or another argument is none of its kind.

    Example:
        >>> accept = BeatsForecast(lambda model: 0.09, losses=[1 / s for s in range(1, 11)])
        >>> accept.forecast(10)  # 1/20
        0.05...
        >>> accept.objection(nn.Identity(), steps=10)
        'the loss is 0.09 after 0 steps of train3, and plain training was forecast to reach 0.05'
    """

    def __init__(self, evaluate: Evaluate, losses: Sequence[float], every: int = 1, after: int = 0) -> None:
        super().__init__(after)
        if len(losses) < 4 or not all(math.isfinite(loss) and loss > 0 for loss in losses):
            raise BypassError("a forecast needs at least 4 losses from before θ*, all positive; use NotWorse otherwise")
        _expect_function("evaluate", evaluate)
        if not is_count(every, 1):
            raise BypassError(f"every is {every!r}; give the steps between two of the losses, 1 or more")
        self._evaluate = evaluate
        self._trained = len(losses) * every
        half = len(losses) // 2
        x = torch.tensor([(index + 1) * every for index in range(half, len(losses))], dtype=torch.float64).log()
        y = torch.tensor(losses[half:], dtype=torch.float64).log()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        self._power = max(0.0, -slope)
        self._scale = float(y.mean() + self._power * x.mean())

    def forecast(self, steps: int) -> float:
        """The loss that plain training would reach `steps` steps after θ*."""
        return math.exp(self._scale - self._power * math.log(self._trained + steps))

    def objection(self, model: nn.Module, steps: int) -> str:
        loss, forecast = _loss(self._evaluate, model), self.forecast(steps)
        if loss <= forecast:
            return ""
        return (
            f"the loss is {loss:.6g} after {self.after} steps of train3, "
            f"and plain training was forecast to reach {forecast:.6g}"
        )


def resolve(accept: Accept | Callable[[nn.Module], Any] | None) -> Accept | None:
    """The condition, made of a plain function where it is one.

    Raises:
        BypassError: it is neither.
    """
    if accept is None or isinstance(accept, Accept):
        return accept
    if not callable(accept):
        raise BypassError(f"accept is {accept!r}; give bypass_fx.NotWorse(evaluate), or a function of the model")
    return Condition(accept)


def _expect_function(name: str, function: Any) -> None:
    if not callable(function):
        raise BypassError(f"{name} is {function!r}; give a function of the model")


def _loss(evaluate: Evaluate, model: nn.Module) -> float:
    """The loss in evaluation mode; the model is as before."""
    with in_eval_mode(model), torch.no_grad():
        return float(evaluate(model))
