"""A run that keeps a bypass on a condition: what fails goes back to θ*, and training goes on to the end from there."""

from __future__ import annotations

import math
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

from bypass_fx.accept import Accept, BeatsForecast, Condition
from bypass_fx.feed import Feed
from bypass_fx.history import History
from bypass_fx.interrupt import Stopped
from bypass_fx.optimizers import make_optimizer
from bypass_fx.settings import SettingsError, preset
from bypass_fx.trainer import Trainer, TrainingError
from tests.runs import digits, kill, mlp, short, trainer

EPOCH = 5
WORSE: dict[str, Any] = {"return_lr": 0.5}  # a λ′ that leaves the loss far above the one at θ*


def _titles(history: History) -> list[str]:
    return [moment.title for moment in history.moments]


def test_what_is_rolled_back_trains_on_from_theta_star_as_if_there_had_been_no_bypass(tmp_path: Path) -> None:
    data, settings = digits(), short(cycles=2, ema=0.5)
    model, plain = mlp(data), mlp(data)
    run = Trainer(model, data, settings, accept=Condition(lambda model: False, after=3), folder=tmp_path / "run")
    history = run.fit()
    optimizer, average = make_optimizer(plain, settings), ModelEmaV3(plain, 0.5)
    undone = (2 + 2 + 2) * EPOCH + 3  # train1, opt1, opt2 and three steps of train3
    for index, ((x, y),) in enumerate(islice(Feed(data.train, 256, 0).from_step(0), run.total_steps)):
        if 2 * EPOCH <= index < undone:
            continue
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(plain)
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in model.state_dict().items())
    kept = load_file(tmp_path / "run" / "averaged.safetensors")
    assert all(torch.allclose(kept[name], value, atol=1e-6) for name, value in average.module.state_dict().items())
    assert _titles(history) == ["θ*", "after opt1", "after proj", "rolled back", "end"]  # and no second cycle
    assert history.moment("rolled back").bypass == history.moment("θ*").bypass
    assert [moment.step for moment in history.moments[3:]] == [undone, run.total_steps]
    assert history.spans()[-1] == ("train3", 6 * EPOCH, run.total_steps)
    assert [report.rolled_back for report in history.reports] == ["accept said no"]
    assert all(record.residual is None and record.out is None for record in history.records if record.phase == "train3")


@pytest.mark.parametrize(("after", "steps"), [(None, 2 * EPOCH), (1, EPOCH), (0, 0)])
def test_not_worse_is_the_training_loss_at_theta_star_and_after_some_of_train3(after: int | None, steps: int) -> None:
    history = trainer(accept="not-worse", accept_after=after, **WORSE).fit()
    assert history.moment("rolled back").step == 6 * EPOCH + steps
    told = history.reports[0].rolled_back
    assert told.endswith(f"and was {history.moment('θ*').bypass.train_loss:.6g} at θ*")
    assert ("after proj" in _titles(history)) == (steps > 0)
    if after is None:  # the verdict falls at the end of the run, from the loss that a run without it ends at
        plain = trainer(**WORSE).fit()
        assert told.startswith(f"the loss is {plain.moment('end').bypass.train_loss:.6g} after {steps} steps of train3")


def test_what_is_good_enough_is_kept_and_nothing_else_differs() -> None:
    kept = trainer(accept="not-worse", accept_tolerance=100.0, **WORSE).fit()
    plain = trainer(**WORSE).fit()
    assert kept.moments == plain.moments and kept.reports == plain.reports and not kept.reports[0].rolled_back


def test_with_baseline_a_bypass_that_becomes_nan_is_rolled_back() -> None:
    data = digits()
    history = Trainer(mlp(data), data, short(accept="baseline", delta_rate=1e30)).fit()
    assert "rolled back" in _titles(history) and "not finite" in history.reports[0].rolled_back
    end = history.moment("end")
    assert end.baseline is not None and math.isfinite(end.bypass.train_loss)


@pytest.mark.parametrize("changes", [{"baseline": False}, {"ema": 0.9}])
def test_the_better_arm_needs_two_of_them_without_an_average(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="set baseline to yes and ema to 0"):
        short(accept="baseline", **changes)


def test_a_forecast_goes_by_the_evaluations_in_train1() -> None:
    history = trainer(train1=6, evaluate_every=1, accept="forecast", accept_after=1, **WORSE).fit()
    losses = [moment.bypass.train_loss for moment in history.evaluations if moment.step <= 6 * EPOCH]
    forecast = BeatsForecast(lambda model: 0.0, losses, EPOCH).forecast((2 + 2 + 1) * EPOCH)
    assert len(losses) == 6
    assert history.reports[0].rolled_back.endswith(f"plain training was forecast to reach {forecast:.6g}")


@pytest.mark.parametrize("n", [0, 1])
def test_a_bypass_that_breaks_is_undone_and_the_run_goes_on(n: int) -> None:
    """In opt2 by an impossible λ′; in opt1 by one step with a broken minibatch's loss."""

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        steps.append(bool(n) and model.training and len(list(model.parameters())) > 6)
        return loss * math.nan if steps[-1] and sum(steps) == 3 else loss

    steps: list[bool] = []
    data = digits()
    settings = short(accept="not-worse", baseline=False, return_lr=None if n else 1e30)
    history = Trainer(mlp(data), data, settings, loss_fn=loss_fn).fit()
    titles = ["θ*", "rolled back", "end"] if n else ["θ*", "after opt1", "rolled back", "end"]
    assert _titles(history) == titles and "is not finite" in history.reports[0].rolled_back
    assert history.moment("rolled back").bypass == history.moment("θ*").bypass
    assert all(math.isfinite(record.loss) for record in history.records)
    assert history.moments[-1].step == 8 * EPOCH
    assert [phase for phase, _, _ in history.spans()] == ["train1", "opt1", *([] if n else ["opt2"]), "train3"]


def test_without_a_condition_a_bypass_that_breaks_ends_the_run() -> None:
    with pytest.raises(TrainingError, match=r"opt2.*lower the learning rate"):
        trainer(return_lr=1e30).fit()


@pytest.mark.parametrize("at_budget", ["contract", "rollback"])
@pytest.mark.filterwarnings("ignore:opt2 ended")
def test_sites_still_out_at_the_end_of_opt2_are_contracted_or_taken_back(at_budget: str) -> None:
    history = trainer(comeback="published", gamma="1e-9", at_budget=at_budget).fit()
    (report,) = history.reports
    assert len(report.left_out) == 2 and bool(report.rolled_back) == (at_budget == "rollback")
    assert _titles(history)[2] == ("rolled back" if at_budget == "rollback" else "after proj")


def test_the_improved_preset_is_never_left_worse_than_theta_star() -> None:
    data = digits()
    model = mlp(data)
    assert isinstance(model, nn.Sequential)
    kill(model[0], 0)  # else there were no bypass
    lengths = {"train1": 2, "opt1": 1, "opt2": 1, "train3": 1, **WORSE}
    history = Trainer(model, data, preset("improved", lengths)).fit()
    assert history.reports[0].rolled_back and len(history.reports) == 1
    at_theta, at_end = (history.moment(name).bypass.train_loss for name in ("θ*", "end"))
    assert at_theta == at_end  # looked at when train3 is over


@pytest.mark.parametrize(("return_lr", "worse"), [(0.012, False), (0.5, True)])
def test_of_both_arms_the_lower_is_kept(return_lr: float, worse: bool, tmp_path: Path) -> None:
    data = digits()
    model = mlp(data)
    settings = short(accept="baseline", cycles=2, return_lr=return_lr)
    history = Trainer(model, data, settings, folder=tmp_path / "run").fit()
    end, last = history.moment("end"), history.moments[-1]
    assert end.baseline is not None
    assert worse == (end.bypass.train_loss > end.baseline.train_loss)
    assert last.name == ("baseline kept" if worse else "end")
    assert last.bypass == (end.baseline if worse else end.bypass)
    x, y = data.train[:]
    loss = nn.functional.cross_entropy(model.eval()(x), y).item()
    assert loss == pytest.approx(min(end.bypass.train_loss, end.baseline.train_loss), rel=1e-5)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert [phase for phase, _, _ in history.spans()] == ["train1", *["opt1", "opt2", "train3"] * 2]


class Counting(Accept):
    """Keeps whatever comes, and counts how often it was begun."""

    begun = 0

    def begin(self, model: nn.Module) -> None:
        self.begun += 1


def test_a_run_that_is_gone_on_with_does_not_begin_its_condition_again(tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if getattr(event, "phase", "") == "opt1":
            signal.raise_signal(signal.SIGTERM)

    first, second = Counting(), Counting()
    with pytest.raises(Stopped):
        Trainer(mlp(digits()), digits(), short(), stop, accept=first, folder=tmp_path / "run").fit()
    history = Trainer(mlp(digits()), digits(), short(), accept=second, folder=tmp_path / "run").fit()
    assert (first.begun, second.begun) == (1, 0) and not history.reports[0].rolled_back


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accept": "not-wrose"}, "did you mean not-worse"),
        ({"accept_after": 3}, "give at most train3, 2 epochs"),
        ({"accept_tolerance": -1.0}, "accept_tolerance is -1.0"),
        ({"accept": "forecast"}, "set cycles to 1 and evaluate_every to 1"),
        ({"accept": "forecast", "evaluate_every": 1, "train1": 3}, "from 4 evaluations"),
        ({"accept": "forecast", "evaluate_every": 1, "train1": 50, "patience": 2}, "from 4 evaluations"),
        ({"accept": "forecast", "evaluate_every": 1, "train1": 9, "cycles": 2}, "for one cycle"),
        ({"at_budget": "rollbak"}, "did you mean rollback"),
    ],
)
def test_conditions_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        short(**changes)
