"""A bypass in Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from bypass_fx.integrations.guide import Guide
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import ScheduleReport


class BypassCallback(Callback):
    """Leads a LightningModule through one bypass; for automatic optimisation with one optimiser.

    Contracts at the end of the training at the latest. A checkpoint that Lightning writes during the bypass holds D, so
    it loads into the extended model only. A run that goes on from one written after it makes no further bypass. Lightning's
    averages of the weights pair parameters by their order, which D changes: begin them after the bypass.

    Args:
        start: the global step at which the bypass begins.
        **arguments: those of `bypass_fx.BypassSchedule`: `opt1` and `opt2` in steps, `comeback`, `mode` and so on.

    Raises:
        BypassError: `opt1` or `opt2` is missing, or `start` is no number of steps; from `fit`: the module has several
            optimisers, or can't be bypassed.

    Example:
        >>> callback = BypassCallback(start=1000, opt1=300, opt2=600)
        >>> callback.report is None
        True
    """

    def __init__(self, start: int, **arguments: Any) -> None:
        self._guide = Guide(start, arguments)
        self._step = 0

    @property
    def report(self) -> ScheduleReport | None:
        """How the bypass went, once it is over."""
        return self._guide.report

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should say of the bypass."""
        return self._guide.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint said."""
        self._guide.load_state_dict(state_dict)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the bypass when its step has come."""
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise BypassError(
                "BypassCallback is for automatic optimisation with one optimizer; in a loop of your own, use BypassSchedule"
            )
        self._step = trainer.global_step
        self._guide.before_step(self._step, pl_module, trainer.optimizers[0])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient."""
        self._guide.before_optimizer_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the optimiser's step, where this batch ended in one."""
        if trainer.global_step > self._step:
            self._guide.after_optimizer_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Contract, if the bypass is not over."""
        self._guide.finish()
