"""A bypass in the Trainer of transformers."""

from __future__ import annotations

from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from bypass_fx.integrations.guide import Guide
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import ScheduleReport

_NAME = "bypass_fx"  # under which a checkpoint says what became of the bypass


class BypassCallback(TrainerCallback):
    """Leads the model of a `transformers.Trainer` through one bypass.

    Contracts at the end of the training at the latest. While the bypass is under way the Trainer writes no checkpoint, as D
    would be in it and not in the model that it is loaded into, and no metric of the extended model counts as the best one. A
    run that goes on from a checkpoint written after the bypass makes no further one.

    Args:
        start: the global step at which the bypass begins.
        **arguments: those of `bypass_fx.BypassSchedule`: `opt1` and `opt2` in steps, `comeback`, `mode` and so on.

    Raises:
        BypassError: `opt1` or `opt2` is missing, or `start` is no number of steps; from `train`: the model can't be
            bypassed, or the Trainer saves whenever a metric is the best, which no callback can keep it from.

    Example:
        >>> callback = BypassCallback(start=1000, opt1=300, opt2=600, mode="all")
        >>> callback.report is None
        True
    """

    def __init__(self, start: int, **arguments: Any) -> None:
        self._guide = Guide(start, arguments)
        self._best: tuple[Any, Any] | None = None  # the metric and its step, as they were when the bypass began

    @property
    def report(self) -> ScheduleReport | None:
        """How the bypass went, once it is over."""
        return self._guide.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Take up what the checkpoint said of the bypass, if the run goes on from one."""
        self._guide.load_state_dict(_said(state).get(_NAME, {}))
        if args.save_strategy == SaveStrategy.BEST and self._guide.report is None:
            raise BypassError(
                "save_strategy='best' would save the extended model too, which loads into no other: take 'steps' or 'epoch'"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Begin the bypass when its step has come."""
        self._guide.before_step(state.global_step, others["model"], others["optimizer"])
        self._keep_out(state, control)

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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Keep the extended model out of checkpoints, and contract where the training ends."""
        self._keep_out(state, control, ends=control.should_training_stop)
        if said := self._guide.state_dict():
            _said(state)[_NAME] = said

    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Contract, if the bypass is not over."""
        self._guide.finish()

    def _keep_out(self, state: TrainerState, control: TrainerControl, ends: bool = False) -> None:
        if not self._guide.under_way:
            return
        if self._best is None:
            self._best = state.best_metric, state.best_global_step
        state.best_metric, state.best_global_step = self._best
        if ends:  # the best checkpoint is loaded before `on_train_end`
            self._guide.finish()
        else:
            control.should_save = False


def _said(state: TrainerState) -> dict[str, Any]:
    """What a checkpoint says of its callbacks, by name; while training it is a dict, whatever the annotation says."""
    return cast(dict[str, Any], state.stateful_callbacks)
