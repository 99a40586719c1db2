"""A bypass that is not kept leaves nothing: θ*, the optimiser, the LR schedulers and the buffers are bit for bit back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from bypass_fx import surgery
from bypass_fx.accept import BeatsForecast, Condition, NotWorse
from bypass_fx.comeback import Penalty
from bypass_fx.gamma import Adaptive, Linear
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import BypassSchedule
from bypass_fx.snapshot import Snapshot
from tests.bypasses import X, Y
from tests.test_param_group import OPTIMIZERS, same

pytestmark = pytest.mark.usefixtures("small_heap")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


class Training:
    """A model, its optimiser and its LR scheduler, some steps into training."""

    def __init__(self, make: Callable[[Any], Optimizer], **arguments: Any) -> None:
        self.model = net()
        self.optimizer = make(self.model.parameters())
        self.driver = lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        self.go(5)
        self.start = copy.deepcopy(self.state())
        self.schedule = BypassSchedule(self.model, self.optimizer, mode="strict", **arguments)

    def state(self) -> Any:
        parts = (self.model, self.optimizer, self.driver)
        momenta = [dict(self.optimizer.state[p]) for p in self.model.parameters() if p in self.optimizer.state]
        return [part.state_dict() for part in parts], momenta, [p.grad for p in self.model.parameters()]

    def go(self, steps: int) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            schedule = getattr(self, "schedule", None)
            loss = self.loss() + (schedule.penalty() if schedule else 0)
            loss.backward()
            return loss

        for _ in range(steps):
            self.optimizer.step(closure)  # type: ignore[arg-type]
            self.optimizer.zero_grad()
            if hasattr(self, "schedule"):
                self.schedule.step()
                if self.schedule.phase == "done":
                    return
            self.driver.step()

    def loss(self, model: nn.Module | None = None) -> Tensor:
        return nn.functional.mse_loss((model or self.model)(X), Y)


MAKERS = {
    **{key: make for key, make in OPTIMIZERS.items() if key != "adam tensor lr"},
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    "layer-wise": lambda p: torch.optim.AdamW(
        [{"params": [one], "lr": 0.1 * 0.5**i} for i, one in enumerate(p)], weight_decay=0.1
    ),
    "timm adamp": lambda p: timm.optim.create_optimizer_v2(p, "adamp", lr=0.1),
}


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_bad_bypass_is_rolled_back_bit_for_bit_with_every_optimiser(
    make: Callable[[Any], Optimizer], where: str, tmp_path: Path
) -> None:
    snapshot = tmp_path / "kept" if where == "disk" else "cpu"
    run = Training(make, opt1=3, opt2=3, accept=Condition(lambda model: False, after=2), snapshot=snapshot)
    assert where == "cpu" or len(list(snapshot.iterdir())) == 1  # type: ignore[union-attr]
    parameters = [parameter for name, parameter in run.model.named_parameters() if "delta" not in name]
    run.go(6)
    assert run.schedule.phase == "train3"
    assert not same(run.state(), run.start)
    run.go(2)
    assert run.schedule.phase == "done"
    assert run.schedule.report is not None and run.schedule.report.rolled_back == "accept said no"
    assert same(run.state(), run.start)
    assert all(now is then for now, then in zip(run.model.parameters(), parameters, strict=True))
    assert where == "cpu" or not list(snapshot.iterdir())  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [MAKERS["adamw foreach"], MAKERS["sgd"]], ids=["adamw", "sgd"])
def test_training_goes_on_after_a_rollback_as_if_there_had_been_no_bypass(make: Callable[[Any], Optimizer]) -> None:
    run, plain = (Training(make, opt1=3, opt2=3, accept=lambda model: False) for _ in range(2))
    plain.schedule.rollback()
    run.go(6)
    for one in (run, plain):
        del one.schedule
        one.go(5)
    assert same(run.state(), plain.state())


def test_what_is_accepted_is_kept_and_the_report_says_nothing() -> None:
    run = Training(MAKERS["adam"], opt1=20, opt2=20, accept=lambda model: True)
    run.go(40)
    assert run.schedule.report is not None and run.schedule.report.rolled_back == ""
    assert run.loss().item() < 0.9 * nn.functional.mse_loss(net()(X), Y).item()
    assert not same(run.state()[0], run.start[0])


def test_not_worse_compares_with_the_loss_at_theta_star_after_some_steps_of_train3() -> None:
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(surgery.is_extended(model) or model.training or torch.is_grad_enabled())
        return float(len(seen))

    for tolerance, kept in ((0.5, False), (1.5, True)):
        seen.clear()
        run = Training(MAKERS["adam"], opt1=2, opt2=2, accept=NotWorse(evaluate, after=3, tolerance=tolerance))
        run.go(6)
        assert run.schedule.phase == "train3"
        run.go(1)
        assert run.schedule.phase == "done"
        assert run.schedule.report is not None
        told = "" if kept else "the loss is 2 after 3 steps of train3, and was 1 at θ*"
        assert run.schedule.report.rolled_back == told
        assert seen == [False, False]
        assert run.model.training


def test_a_loss_that_is_no_number_is_worse() -> None:
    run = Training(MAKERS["adam"], opt1=2, opt2=2, accept=NotWorse(lambda model: float("nan")))
    run.go(4)
    assert same(run.state(), run.start)


def test_the_forecast_goes_on_with_the_power_law_that_the_losses_follow() -> None:
    losses = [3 * (10 * s) ** -0.7 for s in range(1, 40)]
    accept = BeatsForecast(lambda model: 0.0, losses, every=10)
    assert accept.forecast(0) == pytest.approx(losses[-1])
    assert accept.forecast(500) == pytest.approx(3 * (390 + 500) ** -0.7)
    assert BeatsForecast(lambda model: 0.0, [1.0, 2.0, 3.0, 4.0]).forecast(100) == pytest.approx(12**0.5)  # never up


@pytest.mark.parametrize(("loss", "kept"), [(0.04, True), (0.06, False)])
def test_beats_forecast_counts_all_steps_since_theta_star(loss: float, kept: bool) -> None:
    accept = BeatsForecast(lambda model: loss, [1 / s for s in range(1, 11)], after=2)
    run = Training(MAKERS["adam"], opt1=4, opt2=4, accept=accept)  # 1 / (10 + 4 + 4 + 2) = 0.05
    run.go(10)
    assert run.schedule.report is not None
    assert (run.schedule.report.rolled_back == "") == kept


def test_a_forecast_needs_positive_losses() -> None:
    for losses in ([1.0, 0.5, 0.2], [1.0, 0.5, 0.2, 0.0]):
        with pytest.raises(BypassError, match=r"at least 4 losses from before θ.*use NotWorse otherwise"):
            BeatsForecast(lambda model: 0.0, losses)


def test_at_budget_rollback_goes_back_where_sites_are_still_out() -> None:
    run = Training(
        MAKERS["adam"], opt1=3, opt2=4, comeback=Penalty(hand_over=False), gamma=Linear(1e-6), epsilon=1e-9,
        at_budget="rollback",
    )  # fmt: skip
    run.go(9)
    report = run.schedule.report
    assert report is not None and report.rolled_back.startswith("opt2 ended after its 4 steps with 1 of 1 sites")
    assert len(report.left_out) == 1
    assert same(run.state(), run.start)


@pytest.mark.parametrize("steps", [2, 4])
def test_rollback_goes_back_from_any_phase(steps: int) -> None:
    run = Training(MAKERS["adam"], opt1=3, opt2=5)
    run.go(steps)
    run.schedule.rollback()
    assert same(run.state(), run.start)
    with pytest.raises(BypassError, match="no bypass under way"):
        run.schedule.rollback()


def test_what_the_optimiser_steps_beside_the_model_goes_back_too() -> None:
    model, temperature = net(), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.Adam([*model.parameters(), temperature], 0.1)
    schedule = BypassSchedule(model, optimizer, 2, 2, mode="strict")
    (temperature * nn.functional.mse_loss(model(X), Y)).backward()
    optimizer.step()
    schedule.step()
    assert temperature.item() != 1
    schedule.rollback()
    assert temperature.item() == 1
    assert not optimizer.state


def test_attributes_of_the_users_own_objects_are_not_touched() -> None:
    run = Training(MAKERS["adam"], opt1=3, opt2=5)
    run.counter = 1  # type: ignore[attr-defined]
    assert run.__dict__["optimizer"] is run.optimizer  # found among the holders of the optimiser
    run.go(2)
    run.counter = 2  # type: ignore[attr-defined]
    run.schedule.rollback()
    assert run.counter == 2  # type: ignore[attr-defined]


def test_a_snapshot_whose_file_is_gone_says_so(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    snapshot = Snapshot(model, optimizer, tmp_path)
    (file,) = tmp_path.iterdir()
    file.unlink()
    with pytest.raises(BypassError, match=r"theta-star-.*is gone; go back to a checkpoint"):
        snapshot.restore(model, optimizer)


def test_a_frozen_or_tied_model_is_kept_whole() -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    model.register_buffer("unsaved", torch.ones(2), persistent=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    snapshot = Snapshot(model, optimizer)
    before = [value.clone() for value in (*model.parameters(), *model.buffers())]
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    snapshot.restore(model, optimizer)
    assert all(map(torch.equal, before, (*model.parameters(), *model.buffers())))


@pytest.mark.parametrize("after", [0, 2])
def test_a_condition_that_raises_is_asked_again(after: int) -> None:
    answers = iter([KeyError("the disk"), False])

    def holds(model: nn.Module) -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    start = copy.deepcopy(model.state_dict())
    schedule = BypassSchedule(model, optimizer, 1, 1, mode="all", accept=Condition(holds, after))
    for _ in range(1 + after):
        schedule.step()
    with pytest.raises(KeyError):
        schedule.step()
    assert schedule.phase == "train3"
    model[0].bias.data.add_(1)
    schedule.step()
    assert schedule.report is not None and schedule.report.rolled_back == "accept said no"
    assert all(map(torch.equal, start.values(), model.state_dict().values()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Condition(3), "holds is 3; give a function"),  # type: ignore[arg-type]
        (lambda: NotWorse(None), "evaluate is None; give a function"),  # type: ignore[arg-type]
        (lambda: NotWorse(float, tolerance="low"), "tolerance is 'low'"),  # type: ignore[arg-type]
        (lambda: NotWorse(float, tolerance=float("nan")), "tolerance is nan"),
        (lambda: BeatsForecast(float, [4, 3, 2, 1], every=0), "every is 0"),
        (lambda: Penalty(window=2.5), "window=2.5; give a number of steps"),  # type: ignore[arg-type]
        (lambda: Adaptive(1.0, window=2.5), "window=2.5; give a number of steps"),  # type: ignore[arg-type]
    ],
)
def test_what_would_fail_at_the_end_of_a_bypass_is_refused_when_it_is_made(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(BypassError, match=message):
        make()
