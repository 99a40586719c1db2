"""On which condition a run keeps a bypass: what its settings say, with one word for all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from bypass_fx.accept import Accept, BeatsForecast, Evaluate, NotWorse
from bypass_fx.history import Moment
from bypass_fx.phases import Lengths
from bypass_fx.settings import Settings


def condition(settings: Settings, lengths: Lengths, evaluate: Evaluate, before: Sequence[Moment]) -> Accept | None:
    """The condition that the settings name; None where every outcome is kept.

    Args:
        settings: `accept`, and when it is looked at.
        lengths: the phases in steps.
        evaluate: model → loss over the training set.
        before: the evaluations in train1, which a forecast goes by.
    """
    after = lengths.train3 if settings.accept_after is None else settings.accept_after * lengths.epoch
    if settings.accept == "not-worse":
        return NotWorse(evaluate, after, settings.accept_tolerance)
    if settings.accept == "forecast":
        losses = [moment.bypass.train_loss for moment in before]
        return BeatsForecast(evaluate, losses, settings.evaluate_every * lengths.epoch, after)
    return None


class Verdict(Accept):
    """A condition as a run puts it: the main process's objection is that of all, and a resumed bypass has begun already.

    Args:
        condition: evaluated by every process, as sharded models need all of them.
        from_main: gives every process the main one's value.
        begun: whether the bypass began in an earlier part of the run.
    """

    def __init__(self, condition: Accept, from_main: Callable[[Any], Any], begun: bool) -> None:
        super().__init__(condition.after)
        self._condition, self._from_main, self._begun = condition, from_main, begun

    def begin(self, model: nn.Module) -> None:
        if not self._begun:
            self._condition.begin(model)

    def objection(self, model: nn.Module, steps: int) -> str:
        found: str = self._from_main(self._condition.objection(model, steps))
        return found

    def state_dict(self) -> dict[str, Any]:
        return self._condition.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._condition.load_state_dict(state)
