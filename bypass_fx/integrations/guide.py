"""A bypass inside a training loop that is not ours: begins at a step, and adds its penalty's gradient after the backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import gradient_averaging, surgery
from bypass_fx.numeric import is_count
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule, ScheduleReport


class Guide:
    """Leads the model of a foreign loop through one bypass.

    Args:
        start: the step of the loop at which the bypass begins.
        arguments: those of `BypassSchedule`, after the model and the optimiser.

    Raises:
        BypassError: `opt1` or `opt2` is missing, or `start` is no number of steps.
    """

    def __init__(self, start: int, arguments: dict[str, Any]) -> None:
        missing = [name for name in ("opt1", "opt2") if name not in arguments]
        if missing:
            raise BypassError(f"BypassCallback needs {missing[0]}, a number of steps; see bypass_fx.BypassSchedule")
        if not is_count(start):
            raise BypassError(f"BypassCallback's start is {start!r}; give a number of steps, 0 or more")
        self._start, self._arguments = start, arguments
        self._earlier: ScheduleReport | None = None  # of the bypass of the run that is gone on with
        self._model: nn.Module | None = None
        self.schedule: BypassSchedule | None = None

    @property
    def report(self) -> ScheduleReport | None:
        """How the bypass went, once it is over."""
        return self.schedule.report if self.schedule else self._earlier

    @property
    def under_way(self) -> bool:
        """Whether the bypass has begun and is not over."""
        return self.schedule is not None and self.schedule.phase != "done"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should say of the bypass: its report, once it is over."""
        return {"report": self.report.state_dict()} if self.report is not None and not self.under_way else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a run whose checkpoint said this: a bypass that is over does not begin again."""
        self._earlier = ScheduleReport.from_state(state["report"]) if "report" in state else None

    def before_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Begin the bypass when its step has come."""
        if self.schedule is not None or self._earlier is not None or step < self._start:
            return
        self._model = model
        self.schedule = BypassSchedule(model, optimizer, **self._arguments)
        if gradient_averaging.among_several():
            gradient_averaging.average_gradients(surgery.delta_of(model, site) for site in surgery.sites(model))

    def before_optimizer_step(self) -> None:
        """Add the gradient of γ(t) Σ‖ADW‖ to the gradients that the loop has made, unscaled by now."""
        if self.schedule is not None and self._model is not None:
            add_gradient(self.schedule.penalty(), self._model)

    def after_optimizer_step(self) -> None:
        """Note a step of the optimiser."""
        if self.schedule is not None:
            self.schedule.step()

    def finish(self) -> None:
        """Contract at the end of the training, where that comes first."""
        if self.schedule is not None:
            self.schedule.finish()


def add_gradient(penalty: Tensor, model: nn.Module) -> None:
    """Add ∇penalty to the parameters' gradients, past the hooks of DDP and FSDP2, which have reduced theirs.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> add_gradient(3 * net.weight.sum(), net)
        >>> net.weight.grad
        tensor([[3.]])
    """
    if not penalty.requires_grad:
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient.to(parameter.grad.dtype)
