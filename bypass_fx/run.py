"""One run: its two arms, its phases and cycles, and all of its state in a form that can be saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from bypass_fx import constraint, geometry, sharded, surgery, verdict
from bypass_fx.accept import Accept
from bypass_fx.arm import Arm
from bypass_fx.averages import Averages
from bypass_fx.checkpoint import CheckpointError, Checkpoints
from bypass_fx.data import Data, Examples
from bypass_fx.engine import FOREIGN_ERRORS, Engine, inner
from bypass_fx.feed import Feed, placed
from bypass_fx.history import Event, History, Moment, Phase, Score
from bypass_fx.interrupt import Wish
from bypass_fx.passes.errors import PlanError
from bypass_fx.passes.matrices import placed_like
from bypass_fx.passes.plan import Plan
from bypass_fx.passes.units import ExampleInputs
from bypass_fx.phases import Lengths, embedded
from bypass_fx.plateau import Plateau
from bypass_fx.run_log import Losses, RunLog, TrainingError, foreign, where
from bypass_fx.saving import Saving
from bypass_fx.schedule import BypassSchedule, NonFiniteError, ScheduleReport
from bypass_fx.settings import FREE_SETTINGS, STUCK, Settings
from bypass_fx.task import Task


class Run:
    """Both arms from the first step to the last, or from a saved state on."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings,
        task: Task,
        plan: Plan,
        engine: Engine,
        feed: Feed,
        on_event: Callable[[Event], None],
        checkpoints: Checkpoints | None,
        accept: Accept | None,
        example_inputs: ExampleInputs | None,
    ) -> None:
        self._accept, self._example_inputs = accept, example_inputs
        self._data, self._settings, self._task, self._plan = data, settings, task, plan
        self._engine, self._feed = engine, feed
        self._saving = Saving(checkpoints, engine, settings.checkpoint_seconds)
        self._lengths = Lengths.of(settings, feed.steps_per_epoch)
        self.log = RunLog(on_event, self._lengths.total, self._lengths.epoch)
        self._plateau = Plateau(settings.patience, settings.tolerance)
        twin = copy.deepcopy(model) if settings.baseline else None  # now, as a sharded model can't be copied
        self._ema = Averages(model, settings.ema, engine) if settings.ema else None
        self._bypass = Arm.of("bypass", model, settings, engine, task, self._lengths)
        self._baseline = Arm.of("baseline", twin, settings, engine, task, self._lengths) if twin is not None else None
        self._schedule: BypassSchedule | None = None
        self._theta: geometry.Point | None = None
        self._reports: list[ScheduleReport] = []
        self.step, self._cycle, self._cycle_end = 0, 0, 0
        self._phase: Phase = "train1"

    def go(self, wish: Wish | None, how_to_go_on: str) -> History:
        """Take all steps that are left.

        Raises:
            TrainingError: a loss is not finite.
            Stopped: a signal asked for it; the state is saved.
        """
        batches = self._feed.from_step(self.step)
        while self._goes_on():
            self._take(self._next(batches))
            if wish:
                told = f"stopped after step {self.step} of {self._lengths.total}, saved; {how_to_go_on}"
                self._saving.heed(wish, self.step, self.state_dict, told)
        log = self.log
        records, moments, evaluations = tuple(log.records), tuple(log.moments), tuple(log.evaluations)
        return History(
            self._plan, tuple(self._reports), records, moments, self._lengths.epoch, log.seconds(), evaluations
        )

    def averaged(self) -> dict[str, torch.Tensor] | None:
        """The averaged weights, where the settings ask for them; all processes must call this together."""
        return None if self._ema is None else self._ema.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on exactly, sharded tensors gathered; no random state, as all of it is drawn
        from the seed and the step.
        """
        scaler = self._engine.accelerator.scaler
        return {
            "settings": asdict(self._settings),
            "plan": self._plan.to_json(),
            "progress": [self.step, self._phase, self._cycle, self._cycle_end],
            "log": self.log.state_dict(self._engine.mean),
            "plateau": {**self._plateau.state_dict(), "sum": self._plateau_sum()},
            "arms": {arm.name: arm.state_dict() for arm in self._arms()},
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "reports": [asdict(report) for report in self._reports],
            "theta": sharded.gathered(self._theta),
            "ema": self.averaged(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved run stopped.

        Raises:
            CheckpointError: it was saved with other settings, another plan or another model.
        """
        self._expect_same(state)
        self.step, self._phase, self._cycle, self._cycle_end = state["progress"]
        self.log.load_state_dict(state["log"], self._engine.device)
        if state["schedule"] is not None:
            self._schedule = self._embedded(Plan.from_json(state["schedule"]["plan"]), begun=True)
            self._schedule.load_state_dict(state["schedule"])
            self._heed_schedule(self._schedule)
        try:
            for arm in self._arms():
                arm.load_state_dict(state["arms"][arm.name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint is of another model or optimizer ({error}); build that one"
            ) from error
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])
        if state["scaler"] is not None and self._engine.accelerator.scaler is not None:
            self._engine.accelerator.scaler.load_state_dict(state["scaler"])
        if state["theta"] is not None:
            own = dict(self._bypass.model.named_parameters())
            self._theta = {name: placed_like(own[name], value) for name, value in state["theta"].items()}
        self._reports = [*map(ScheduleReport.from_state, state["reports"])]
        self._plateau.load_state_dict(state["plateau"])

    def _expect_same(self, state: Mapping[str, Any]) -> None:
        before, now = asdict(Settings()) | state["settings"], asdict(self._settings)
        changed = [name for name in now if name not in FREE_SETTINGS and before[name] != now[name]]
        if changed:
            name = changed[0]
            raise CheckpointError(f"the checkpoint was saved with {name}={before[name]!r}, not {now[name]!r}; set that")
        try:
            same = Plan.from_json(state["plan"]) == self._plan
        except PlanError:
            same = False
        if not same:
            raise CheckpointError("the checkpoint was saved with another plan; take the same model, mode and select")

    def _arms(self) -> list[Arm]:
        return [self._bypass] if self._baseline is None else [self._bypass, self._baseline]

    def _next(self, batches: Any) -> list[Any]:
        with self._saving.before_bad_data(self.step, self.state_dict):
            parts = next(batches)
        return [placed(part, self._engine.device, self._settings.channels_last) for part in parts]

    def _goes_on(self) -> bool:
        with self._saving.before_bad_data(self.step, self.state_dict):
            return self._advance()

    def _advance(self) -> bool:
        """Go over into the next phase where this one is at its end; False at the end of the run."""
        while True:
            schedule = self._schedule
            if self._phase == "train1" and (self.step >= self._lengths.train1 or self._plateau.reached):
                self._begin_cycle()
            elif schedule is not None and _rolled_back(schedule):
                self._roll_back(schedule)
            elif self._phase == "opt1" and schedule is not None and schedule.phase != "opt1":
                self._moment("after opt1")
                self._phase = "opt2"
            elif self._phase == "opt2" and schedule is not None and schedule.phase != "opt2":
                self._moment("after proj")
                self._phase = "train3"
            elif self._phase == "train3" and schedule is not None and schedule.phase == "done":
                self._keep(schedule)
            elif self._phase == "train3" and self.step >= self._cycle_end:
                if self._cycle_end >= self._theta_star + self._lengths.cycles * self._lengths.cycle:
                    self._moment("end")
                    self._take_the_better()
                    return False
                self._begin_cycle()
            else:
                return True

    def _take_the_better(self) -> None:
        """Where the settings say so, let the user hold what the baseline ended with, if that is lower."""
        end = self.log.moments[-1]
        if self._settings.accept != "baseline" or self._baseline is None or end.baseline is None:
            return
        if end.baseline.train_loss < end.bypass.train_loss or math.isnan(end.bypass.train_loss):
            self._baseline.copy_to(self._bypass)
            self._moment("baseline kept")

    def _begin_cycle(self) -> None:
        if self._cycle == 0 and self._baseline is not None:
            self._bypass.copy_to(self._baseline)
        self._moment("θ*")
        self._cycle += 1
        if self._settings.geometry and self._theta is None:
            self._theta = geometry.point(self._bypass.model)
        self._cycle_end = self.step + self._lengths.cycle
        plan = self._sites()
        if len(plan):
            self._schedule = inner(self._bypass.runner).schedule = self._embedded(plan)
            self._phase = "opt1"
        else:
            self._train_on("nothing stuck")

    def _sites(self) -> Plan:
        """The sites of the coming bypass."""
        if self._settings.select != STUCK:
            return self._plan
        try:
            return self._bypass.stuck(self._plan, self._data, self._settings, self._engine, self._example_inputs)
        except FOREIGN_ERRORS as error:
            raise foreign(error, f"the search for stuck channels failed after step {self.step}") from error

    def _keep(self, schedule: BypassSchedule) -> None:
        self._end_bypass(schedule)
        if self._ema is not None:
            # An average over the bypass would mix weights of two architectures.
            self._ema.begin_anew(self._bypass.model)

    def _roll_back(self, schedule: BypassSchedule) -> None:
        """Go on from θ*, where the schedule has brought all back."""
        self._train_on("rolled back")
        self._end_bypass(schedule)

    def _train_on(self, moment: str) -> None:
        """Let train3 have the steps of the cycles that will not be, too."""
        self._phase = "train3"
        self._moment(moment)
        self._cycle_end += (self._lengths.cycles - self._cycle) * self._lengths.cycle

    def _end_bypass(self, schedule: BypassSchedule) -> None:
        assert schedule.report is not None
        self._reports.append(schedule.report)
        self._schedule = None

    @property
    def _theta_star(self) -> int:
        """The step at which the first θ* lies, 0 before."""
        return next((moment.step for moment in self.log.moments if moment.name == "θ*"), 0)

    def _embedded(self, plan: Plan, begun: bool = False) -> BypassSchedule:
        before = [moment for moment in self.log.evaluations if moment.step <= self._theta_star]
        accept = self._accept or verdict.condition(self._settings, self._lengths, self._training_loss, before)
        if accept is not None:
            accept = verdict.Verdict(accept, self._engine.from_main, begun)
        model, machine = self._bypass.model, (self._settings, plan, self._lengths, accept, self._example_inputs)
        schedule = embedded(model, self._bypass.optimizer, *machine)
        if not self._engine.sharded:  # there, extend has seen to it
            self._engine.share_gradients([surgery.delta_of(model, site) for site in surgery.sites(model)])
        return schedule

    def _take(self, parts: list[Any]) -> None:
        """One step of both arms."""
        due = self.log.next_is_due
        measured = due and self._settings.geometry and self._theta is not None
        before = [geometry.point(arm.model) for arm in self._arms()] if measured else []
        self.step += 1
        loss = self._update(self._bypass, parts)
        whole = self._schedule is None or self._note_step(self._schedule)
        other = self._update(self._baseline, parts) if self._baseline is not None and self._phase != "train1" else None
        if whole:
            self.log.note(Losses(self.step, self._phase, loss, other))
        if self._ema is not None and self._schedule is None:
            self._ema.update(self._bypass.model)
        if self._phase == "train1":
            self._plateau.note(loss)
        if due and whole:
            self._record(before)
        if self.step % self._lengths.epoch == 0:
            self._epoch_over()

    def _epoch_over(self) -> None:
        epoch = self.step // self._lengths.epoch
        if self._phase == "train1" and self._settings.patience:
            self._plateau.epoch_over(self._plateau_sum() / self._lengths.epoch)
        if self._settings.evaluate_every and epoch % self._settings.evaluate_every == 0:
            self._moment("evaluation")

    def _plateau_sum(self) -> float:
        total = torch.as_tensor(self._plateau.sum, dtype=torch.float64, device=self._engine.device)
        return float(self._engine.mean(total))

    def _update(self, arm: Arm, parts: list[Any]) -> torch.Tensor:
        """One step of an arm; its training loss before the step, without the penalty, over this process's share."""
        _seed(self._engine.device, self._settings.seed + self.step + 1_000_003 * self._engine.shares.rank)
        here = where(self._phase, self.step, self._lengths.epoch)
        loss = self._engine.backward(
            arm.runner, parts, lambda error: foreign(error, f"the {arm.name} failed in {here}")
        )
        arm.stepper.step()
        arm.stepper.zero_grad()
        if arm.lr_schedule is not None:
            arm.lr_schedule.step_update(self.step)
        return loss

    def _note_step(self, schedule: BypassSchedule) -> bool:
        """Tell the schedule of a step of the bypass; whether that was a whole one, with a finite outcome.

        Raises:
            TrainingError: it was not, and there is no θ* to go back to.
        """
        try:
            schedule.step(look=True)  # what is recorded of the step must be finite
        except NonFiniteError as error:
            if not _rolled_back(schedule):
                here = where(self._phase, self.step, self._lengths.epoch)
                raise TrainingError(f"{here}: {error}") from error
            return False
        finally:
            self._heed_schedule(schedule)
        return True

    def _heed_schedule(self, schedule: BypassSchedule) -> None:
        """Have the schedule's penalty in the loss for as long as there is one."""
        inner(self._bypass.runner).schedule = schedule if schedule.phase in ("opt1", "opt2") else None

    def _record(self, before: list[geometry.Point]) -> None:
        schedule = self._schedule
        residuals: dict[str, float] | None = None
        if self._phase == "opt1":
            residuals = {name: norm.item() for name, norm in constraint.norms(self._bypass.model).items()}
        elif self._phase == "opt2" and schedule is not None:
            residuals = dict(schedule.norms)
        others = (before[1], self._baseline.model) if self._baseline is not None and before else None
        seen = geometry.between(self._theta, before[0], self._bypass.model, others) if before and self._theta else None
        rate = self._bypass.optimizer.param_groups[0].get("lr")
        self.log.record(
            self._engine.mean,
            residuals,
            len(schedule.out) if residuals is not None and schedule is not None else None,
            self._cycle,
            None if rate is None else float(rate),
            seen,
        )

    def _moment(self, name: str) -> None:
        if self.log.is_pending and name != "evaluation":
            self._record([])
        starts = name == "θ*"
        bypass = self._score(self._bypass)
        has_baseline = self._baseline is not None and (starts or self._cycle > 0)
        baseline = self._score(self._baseline) if self._baseline is not None and has_baseline else None
        self.log.moment(Moment(name, self.step, bypass, baseline, max(1, self._cycle + starts)))

    def _score(self, arm: Arm) -> Score:
        return Score(self._score_over(arm, self._data.train), self._score_over(arm, self._data.test))

    def _score_over(self, arm: Arm, examples: Examples) -> dict[str, float]:
        try:
            total = arm.total_of(self._data, examples, self._settings, self._engine)
        except FOREIGN_ERRORS as error:
            raise foreign(error, f"the evaluation of the {arm.name} failed after step {self.step}") from error
        return self._task.score(total.tolist())

    def _training_loss(self, model: nn.Module) -> float:
        """Of the bypassed model, over the training set; at θ* that was just looked at."""
        last = self.log.moments[-1]
        if last.step == self.step:
            return last.bypass.train_loss
        return self._score_over(self._bypass, self._data.train)["loss"]


def _rolled_back(schedule: BypassSchedule) -> bool:
    return schedule.report is not None and bool(schedule.report.rolled_back)


def _seed(device: torch.device, seed: int) -> None:
    """`torch.manual_seed` for one device; that one notes a stack trace for every backend, slower than a small step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
