"""The trainer: train1 → embed → opt1 → opt2 → proj → train3, beside a baseline that goes on from the same θ*."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import constraint, surgery
from bypass_fx.data import Data, minibatches, prepare, steps_per_epoch
from bypass_fx.evaluation import evaluate, expect_fit, loss_of
from bypass_fx.history import Event, History, Moment, Phase, Record, Score
from bypass_fx.nearest import did_you_mean
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule, NonFiniteError
from bypass_fx.settings import Settings, SettingsError, parse_gamma

RECORDS = 2000  # a run keeps about this many records, however many steps it has
STEPS_PER_RECORD = 50  # within a long epoch, so that progress can be seen
_ONE_THREAD = 1e7  # floating-point operations of a forward: a millisecond of one core


class TrainingError(BypassError):
    """The loss stopped being finite."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """One minibatch and its place in the run: steps count from 1, `epoch` is how many are over after this step."""

    step: int
    epoch: float
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class _Arm:
    """One of the two runs: the model and its optimiser."""

    name: str
    model: nn.Module
    optimizer: Optimizer


class Trainer:
    """Trains a model through one bypass, and a copy of it without, on the same minibatches in the same number of steps.

    `fit` changes the model in place and leaves it on `settings.device`, in the original architecture. If training
    fails, the model gets the weights back that it came with.

    Args:
        model: the model, new or trained.
        data: what to train on; see `bypass_fx.data.load`.
        settings: the phases, the optimiser and the bypass.
        on_event: called with each `Record` and each `Moment` as it comes up.

    Raises:
        BypassError: the model has no site or can't take the data, or a setting names something unknown.

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
    ) -> None:
        self.settings = settings or Settings()
        self.model, self.data, self.on_event = model, data, on_event
        self._device = resolve_device(self.settings.device)
        self._epoch_steps = steps_per_epoch(data.train, self.settings.batch_size)
        self._flops = expect_fit(model.to(self._device), data, self._device) * self.settings.batch_size
        self.plan = surgery.plan(model, mode=self.settings.mode, select=self.settings.select)
        # Embeds and contracts once, which changes nothing at D = 0: what can't be done shows now and not after train1.
        self._embed(_Arm("bypass", model, make_optimizer(model, self.settings))).finish()

    @property
    def total_steps(self) -> int:
        """Steps that each arm has taken at the end."""
        return self.train1_steps + self._opt1_steps + self._epoch_steps * (self.settings.opt2 + self.settings.train3)

    @property
    def train1_steps(self) -> int:
        """Steps before θ*, where there is one arm only."""
        return self._epoch_steps * self.settings.train1

    @property
    def _opt1_steps(self) -> int:
        return self.settings.opt1 * self._epoch_steps if self.settings.n is None else self.settings.n

    def fit(self) -> History:
        """Run all phases of both arms.

        Raises:
            TrainingError: a loss is not finite; names the arm, the phase, the epoch and the step.
        """
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices), _threads(self._flops), _undone_on_error(self.model):
            self.model.train()
            return self._run()

    def _run(self) -> History:
        log = _Log(self.on_event, self.total_steps, self._epoch_steps)
        batches = self._batches()
        bypass = _Arm("bypass", self.model, make_optimizer(self.model, self.settings))
        for batch in islice(batches, self.train1_steps):
            log.note(batch, "train1", self._step(bypass, batch, "train1"), None, lambda: None)
        baseline = self._copied(bypass)

        def moment(name: str, step: int) -> None:
            log.moment(Moment(name, step, self._score(bypass), self._score(baseline)))

        step = self.train1_steps
        moment("θ*", step)
        schedule = self._embed(bypass)
        phase: Phase = "opt1"
        for batch in batches:
            if phase == "opt1" and schedule.phase != "opt1":
                moment("after opt1", step)
                phase = "opt2"
            if phase == "opt2" and schedule.phase == "done":
                moment("after proj", step)
                phase = "train3"
            if step == self.total_steps:
                break
            losses = self._step(bypass, batch, phase, schedule), self._step(baseline, batch, phase)
            log.note(batch, phase, *losses, partial(_residuals, self.model, schedule, phase))
            step = batch.step
        moment("end", step)
        records, moments = tuple(log.records), tuple(log.moments)
        return History(self.plan, schedule.finish(), records, moments, self._epoch_steps, log.seconds())

    def _batches(self) -> Iterator[_Batch]:
        """Minibatches without end, epoch after epoch, on the device; both arms take each of them."""
        steps = count(1)
        for epoch in count():
            for x, y in minibatches(self.data.train, self.settings.batch_size, self.settings.seed, epoch):
                step = next(steps)
                yield _Batch(step, step / self._epoch_steps, prepare(x.to(self._device)), y.to(self._device))

    def _step(self, arm: _Arm, batch: _Batch, phase: Phase, schedule: BypassSchedule | None = None) -> float:
        """One step of an arm; its training loss before the step, without the penalty."""
        _seed(self._device, self.settings.seed + batch.step)  # dropout is the same in both arms
        loss = loss_of(self.data.task, arm.model(batch.x), batch.y)
        value = loss.item()
        where = f"{phase}, epoch {math.ceil(batch.epoch)}, step {batch.step}"
        fix = "lower the learning rate (lr, return_lr) or look for broken values in the data"
        if not math.isfinite(value):
            raise TrainingError(f"the loss of the {arm.name} became {value} in {where}; {fix}")
        if schedule:
            loss = loss + schedule.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        arm.optimizer.step()
        arm.optimizer.zero_grad()
        if schedule:
            try:
                schedule.step()
            except NonFiniteError as error:
                raise TrainingError(f"{where}: {error}") from error
        return value

    def _copied(self, arm: _Arm) -> _Arm:
        """The baseline: the same weights and the same optimiser state, in tensors of its own."""
        model = copy.deepcopy(arm.model)
        optimizer = make_optimizer(model, self.settings)
        optimizer.load_state_dict(copy.deepcopy(arm.optimizer.state_dict()))
        return _Arm("baseline", model, optimizer)

    def _embed(self, arm: _Arm) -> BypassSchedule:
        settings = self.settings
        return BypassSchedule(
            arm.model,
            arm.optimizer,
            opt1=self._opt1_steps,
            opt2=settings.opt2 * self._epoch_steps,
            gamma=parse_gamma(settings.gamma),
            epsilon=settings.epsilon,
            comeback=settings.comeback,
            lr=settings.return_lr,
            unit="epoch" if settings.gamma_unit == "epoch" else "step",
            steps_per_epoch=self._epoch_steps,
            plan=self.plan,
            mode=settings.mode,
            select=settings.select,
        )

    def _score(self, arm: _Arm) -> Score:
        train_loss, train_accuracy = evaluate(arm.model, self.data, self.data.train)
        test_loss, test_accuracy = evaluate(arm.model, self.data, self.data.test)
        return Score(train_loss, test_loss, train_accuracy, test_accuracy)


_Norms = dict[str, float] | None


class _Log:
    """Gathers the losses of the steps into records, and keeps records and moments in order."""

    def __init__(self, on_event: Callable[[Event], None], total_steps: int, epoch_steps: int) -> None:
        self.records: list[Record] = []
        self.moments: list[Moment] = []
        self._on_event = on_event
        self._every = max(math.ceil(total_steps / RECORDS), min(epoch_steps, STEPS_PER_RECORD))
        self._started = time.perf_counter()
        self._pending: list[tuple[float, float | None]] = []
        self._close: Callable[[], None] = lambda: None

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._started

    def note(
        self, batch: _Batch, phase: Phase, loss: float, baseline: float | None, residuals: Callable[[], _Norms]
    ) -> None:
        """Count one step in; a record is due every so many steps, and at each moment."""
        self._pending.append((loss, baseline))
        self._close = partial(self._record, batch.step, batch.epoch, phase, residuals)
        if len(self._pending) == self._every:
            self._close()

    def moment(self, moment: Moment) -> None:
        """Close the record under way, then note the moment."""
        if self._pending:
            self._close()
        self.moments.append(moment)
        self._on_event(moment)

    def _record(self, step: int, epoch: float, phase: Phase, residuals: Callable[[], _Norms]) -> None:
        losses = [loss for loss, _ in self._pending]
        others = [other for _, other in self._pending if other is not None]
        baseline = fmean(others) if others else None
        norms = residuals()
        residual = sum(norms.values()) if norms is not None else None
        self.records.append(Record(step, epoch, phase, fmean(losses), baseline, residual, self.seconds(), norms))
        self._pending.clear()
        self._on_event(self.records[-1])


def _residuals(model: nn.Module, schedule: BypassSchedule, phase: Phase) -> _Norms:
    """‖ADW‖ or ‖D‖ of each site; the schedule has them from the last step of opt2, after which the sites are gone."""
    if phase == "opt1":
        return {name: norm.item() for name, norm in constraint.norms(model).items()}
    return dict(schedule.norms) if phase == "opt2" else None


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for one device; that one notes a stack trace for every backend, slower than a small step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the accelerator where there is one, else the CPU.

    Raises:
        SettingsError: there is no such device here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    try:
        found = torch.accelerator.current_accelerator(check_available=True) if name == "auto" else torch.device(name)
        return torch.empty(0, device=found or "cpu").device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device {name!r} can't be used here ({reason}); take auto or cpu") from error


def make_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """The optimiser that timm's factory makes of the settings.

    Raises:
        SettingsError: timm knows no optimiser of that name (the nearest names are offered), or can't make it.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    name = settings.optimizer
    known = [str(entry) for entry in list_optimizers()]
    if name.lower().rpartition("_")[2] not in known:
        raise SettingsError(f"unknown optimizer {name!r}; {did_you_mean(name.lower(), known, 'take adam, say')}")
    try:
        return create_optimizer_v2(
            model, opt=name, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum
        )
    except Exception as error:
        raise SettingsError(f"optimizer {name!r} can't be made: {type(error).__name__}: {error}; try adam") from error


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
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    was_training = model.training
    try:
        yield
    except Exception:
        if surgery.is_extended(model):
            surgery.contract(model)
        model.load_state_dict(saved)
        model.train(was_training)
        raise
