"""One of the two runs beside each other: a model with all that trains it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import sharded
from bypass_fx.data import Data, Examples
from bypass_fx.engine import Engine, evaluating, inner
from bypass_fx.evaluation import total_of
from bypass_fx.feed import EVAL_BATCH, in_order, placed
from bypass_fx.optimizers import make_lr_schedule, make_optimizer
from bypass_fx.passes.plan import Plan
from bypass_fx.passes.units import ExampleInputs
from bypass_fx.phases import Lengths
from bypass_fx.settings import Settings
from bypass_fx.stuck import stuck
from bypass_fx.task import Task


@dataclass(frozen=True, slots=True)
class Arm:
    """The model, what the processes call of it, its optimiser (also as the machine steps it) and its LR schedule."""

    name: str
    model: nn.Module
    runner: nn.Module
    optimizer: Optimizer
    stepper: Any
    lr_schedule: Any

    @classmethod
    def of(cls, name: str, model: nn.Module, settings: Settings, engine: Engine, task: Task, lengths: Lengths) -> Arm:
        """The arm that trains a model as the settings say."""
        model.train()
        runner = engine.runner(model, task)
        optimizer = make_optimizer(model, settings)
        lr_schedule = make_lr_schedule(optimizer, settings, lengths.total, lengths.epoch)
        return cls(name, model, runner, optimizer, engine.stepper(optimizer), lr_schedule)

    def copy_to(self, other: Arm) -> None:
        """Give another arm, sharded in the same way, this one's weights and optimiser state."""
        other.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def total_of(self, data: Data, examples: Examples, settings: Settings, engine: Engine) -> Tensor:
        """What the task's sums add up to over a set, in evaluation mode; all processes must call this together."""
        with evaluating(self.runner), engine.accelerator.autocast():
            machine = (engine.device, engine.shares, settings.channels_last, settings.workers)
            return engine.total(total_of(self.runner, data, examples, *machine))

    def stuck(
        self, plan: Plan, data: Data, settings: Settings, engine: Engine, example_inputs: ExampleInputs | None
    ) -> Plan:
        """The stuck channels at a plan's sites, over the training set; all processes must call this together."""
        machine = (engine.shares, data.collate, settings.workers)
        batches = (
            placed(batch, engine.device, settings.channels_last)
            for batch, _ in in_order(data.train, EVAL_BATCH, *machine)
        )

        def loss(model: nn.Module, batch: Any) -> Tensor:
            found: Tensor = inner(self.runner)(batch)[0]
            return found

        found = stuck(self.model, loss, batches, plan=plan, example_inputs=example_inputs, total=engine.total)
        return found.plan

    def state_dict(self) -> dict[str, Any]:
        """Model and optimiser in whole tensors; all processes must call this together."""
        return {
            "model": sharded.gathered(self.model.state_dict()),
            "optimizer": sharded.gathered(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            KeyError, ValueError, RuntimeError: it is of another model or optimiser.
        """
        sharded.load_model(self.model, state["model"])
        sharded.load_optimizer(self.optimizer, state["optimizer"])
