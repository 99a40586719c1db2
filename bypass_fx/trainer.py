"""The trainer: train1 → embed → opt1 → opt2 → proj → train3, beside a baseline that goes on from the same θ*."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bypass_fx import sharded, surgery
from bypass_fx.accept import Accept, resolve
from bypass_fx.data import Data
from bypass_fx.engine import Engine
from bypass_fx.evaluation import expect_fit
from bypass_fx.feed import Feed, placed
from bypass_fx.history import Event, History
from bypass_fx.interrupt import noticed
from bypass_fx.models import ModelError
from bypass_fx.optimizers import make_optimizer
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.units import ExampleInputs
from bypass_fx.phases import Lengths, embedded
from bypass_fx.run import Run
from bypass_fx.run_log import TrainingError
from bypass_fx.settings import Settings
from bypass_fx.task import LossFn, task

if TYPE_CHECKING:
    from bypass_fx.run_folder import RunFolder

__all__ = ["Trainer", "TrainingError"]

_ONE_THREAD = 1e7  # floating-point operations of a forward: a millisecond of one core


class Trainer:
    """Trains a model through one bypass or several, and a copy of it without, on the same minibatches.

    On one process or, under `torchrun` or `accelerate launch`, on many: the minibatches are the same then, and each
    process takes its share of them. `fit` changes the model in place and leaves it on its device, in the original
    architecture. If training fails, the model gets the weights back that it came with.

    Args:
        model: any module, new or trained.
        data: what to train on; see `bypass_fx.data`.
        settings: the phases, the optimiser, the bypass and the machine.
        on_event: called with each `Record` and each `Moment` as it comes up, in the main process.
        loss_fn: `loss_fn(model, batch)` gives the mean loss of a minibatch; None takes that of the data's task.
        accept: on which condition the outcome of a bypass is kept, as `BypassSchedule` takes it; None takes what the
            settings say. Every process calls it, and the main process's word holds.
        folder: where the run is written: records as they come, checkpoints, and at the end the weights. If a run lies
            there, `fit` goes on with it.
        about: what else `folder` should say of the run.
        example_inputs: as for `bypass_fx.plan`, where it takes a run on them to see how modules are called.

    Raises:
        BypassError: an argument is of another kind, the model has no site or can't take the data, or a setting names
            something unknown.

    Example:
        >>> from bypass_fx import data, models, settings
        >>> digits = data.load("digits", vectors=True)
        >>> model = models.build("mlp", models.Fit(digits.shape, digits.outputs))
        >>> history = Trainer(model, digits, settings.Settings(train1=2, opt1=1, opt2=1, train3=1)).fit()
        >>> [moment.name for moment in history.moments]
        ['θ*', 'after opt1', 'after proj', 'end']
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        *,
        loss_fn: LossFn | None = None,
        accept: Accept | Callable[[nn.Module], Any] | None = None,
        folder: str | Path | None = None,
        about: dict[str, Any] | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        for name, given, kind in (("model", model, nn.Module), ("data", data, Data), ("settings", settings, Settings)):
            if not isinstance(given, kind) and (name, given) != ("settings", None):
                raise BypassError(f"{name} is a {type(given).__name__}; give a {kind.__module__}.{kind.__qualname__}")
        self._accept = resolve(accept)
        self.settings = settings or Settings()
        self.model, self.data, self.on_event = model, data, on_event
        self.task = task(data.task, loss_fn)
        self._engine = Engine(self.settings)
        self._feed = Feed(
            data.train, self.settings.batch_size, self.settings.seed, self._engine.shares, data.collate,
            self.settings.workers,
        )  # fmt: skip
        self.lengths = Lengths.of(self.settings, self._feed.steps_per_epoch)
        at_once = self.settings.batch_size // (self._engine.shares.world * self._engine.shares.parts)
        self._flops = expect_fit(model.to(self._engine.device), data, self.task, self._engine.device) * at_once
        self._inputs = placed(example_inputs, self._engine.device, self.settings.channels_last)
        self.plan = surgery.plan(model, self.settings.mode, self.settings.pattern, self._inputs)
        # Embeds and contracts once, which changes nothing at D = 0: what can't be done shows now and not after train1.
        optimizer = make_optimizer(model, self.settings)
        embedded(model, optimizer, self.settings, self.plan, self.lengths, None, self._inputs).finish()
        if self.settings.gradient_checkpointing:
            _checkpoint_gradients(model)
        self._folder = self._opened(folder, about or {}) if folder else None

    @property
    def total_steps(self) -> int:
        """Steps that each arm has taken at the end, at most."""
        return self.lengths.total

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self._engine.is_main

    def fit(self) -> History:
        """Run all phases of both arms, or what is left of them.

        Raises:
            TrainingError: a loss is not finite; names the arm, the phase, the epoch and the step.
            CheckpointError: the folder holds checkpoints, and none that can be used.
            Stopped: SIGTERM or Ctrl-C asked for it; everything is saved in the folder.
        """
        devices = [self._engine.device] if self._engine.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _threads(self._flops), _undone_on_error(self.model):
            return self._fit()

    def _fit(self) -> History:
        writer = self._folder if self._engine.is_main else None
        checkpoints = self._folder.checkpoints(self.settings.keep) if self._folder else None
        run = Run(
            self.model, self.data, self.settings, self.task, self.plan, self._engine, self._feed, self._emit, checkpoints,
            self._accept, self._inputs,
        )  # fmt: skip
        if checkpoints:
            found = checkpoints.newest() if self._engine.is_main else None
            step = self._engine.from_main(found and found[0])
            if step is not None:
                run.load_state_dict(found[1] if found else checkpoints.load(step))
        with contextlib.ExitStack() as stack:
            if writer:
                stack.enter_context(writer.writing(run.log.records, run.log.moments, run.log.evaluations))
            wish = stack.enter_context(noticed()) if self._folder else None  # else Ctrl-C ends the step where it is
            history = run.go(wish, self._folder.how_to_go_on if self._folder else "")
        state, averaged = sharded.gathered(self.model.state_dict()), run.averaged()
        if writer:
            writer.finish(history, state, averaged)
        return history

    def _emit(self, event: Event) -> None:
        if self._engine.is_main:
            if self._folder:
                self._folder.note(event)
            self.on_event(event)

    def _opened(self, folder: str | Path, about: dict[str, Any]) -> RunFolder:
        from bypass_fx.run_folder import RunFolder

        what = {"data": self.data.name, **about, "settings": asdict(self.settings)}
        return RunFolder(Path(folder), what, self.plan)


def _checkpoint_gradients(model: nn.Module) -> None:
    """Have the model compute activations anew in the backward, in timm's way or in transformers'."""
    for name, arguments in (("set_grad_checkpointing", (True,)), ("gradient_checkpointing_enable", ())):
        switch = getattr(model, name, None)
        if callable(switch):
            switch(*arguments)
            return
    raise ModelError(
        f"{type(model).__name__} has neither timm's set_grad_checkpointing nor transformers' gradient_checkpointing_enable; "
        "leave out gradient_checkpointing, and wrap its blocks in torch.utils.checkpoint"
    )


@contextlib.contextmanager
def _threads(flops: float) -> Iterator[None]:
    """One thread where a step is too small to share; on a busy machine, threads that wait for each other take ages."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if flops < _ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give the model its architecture, weights and mode back where the body raises."""
    saved = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    was_training = model.training
    try:
        yield
    except BaseException:
        if surgery.is_extended(model):
            surgery.contract(model)
        sharded.load_model(model, saved)
        model.train(was_training)
        raise
