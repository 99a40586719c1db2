"""A bypass in the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bypass_fx.integrations.guide import Guide
from bypass_fx.schedule import ScheduleReport


class BypassCallback(TrainerCallback):
    """Leads the model of a `transformers.Trainer` through one bypass.

    Contracts at the end of the training at the latest. A checkpoint that the Trainer writes during the bypass holds D, so
    it loads into the extended model only.

    Args:
        start: the global step at which the bypass begins.
        **arguments: those of `bypass_fx.BypassSchedule`: `opt1` and `opt2` in steps, `comeback`, `mode` and so on.

    Raises:
        BypassError: from `train`: the model can't be bypassed.

    Example:
        >>> callback = BypassCallback(start=1000, opt1=300, opt2=600, mode="all")
        >>> callback.report is None
        True
    """

    def __init__(self, start: int, **arguments: Any) -> None:
        self._guide = Guide(start, arguments)

    @property
    def report(self) -> ScheduleReport | None:
        """How the bypass went, once it is over."""
        return self._guide.report

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Begin the bypass when its step has come."""
        self._guide.before_step(state.global_step, others["model"], others["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Add the penalty's gradient."""
        self._guide.before_optimizer_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Note the optimiser's step."""
        self._guide.after_optimizer_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Contract, if the bypass is not over."""
        self._guide.finish()
