"""What stands around a training loop goes on working: scalers, averaged copies, accumulation, clipping, every optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bypass_fx
from bypass_fx import surgery
from bypass_fx.comeback import Penalty
from bypass_fx.gamma import Linear
from bypass_fx.schedule import BypassSchedule
from tests.bypasses import X, Y, begin, deltas, mlp, train_step, until_done

pytestmark = pytest.mark.usefixtures("small_heap")
RETURNS = ["penalty", "proximal", "homotopy", "lagrangian", "variety"]
Optimizer = torch.optim.Optimizer


def layer_wise(model: nn.Module) -> Optimizer:
    rates = [0.01 * 0.7**depth for depth, _ in enumerate(model.children())]
    groups = [{"params": [*layer.parameters()], "lr": lr} for layer, lr in zip(model.children(), rates, strict=True)]
    return torch.optim.AdamW([group for group in groups if group["params"]])


class SAM(Optimizer):
    """Sharpness-aware minimisation as it is mostly written: around an optimiser of the same groups, in two steps."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **arguments: Any) -> None:
        super().__init__(params, {"rho": rho, **arguments})
        self.base_optimizer = base(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        self.first_step()
        closure()
        self.second_step()


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd with momentum": lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, nesterov=True),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), 0.01, fused=True),
    "adamw foreach": lambda m: torch.optim.AdamW(m.parameters(), 0.01, foreach=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), 0.05),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), 0.02, max_iter=2),
    "layer-wise rates": layer_wise,
    "sam": lambda m: SAM(m.parameters(), torch.optim.AdamW, lr=0.01),
    "timm nadamw": lambda m: timm.optim.create_optimizer_v2(m, "nadamw", lr=0.01),
    "timm lookahead": lambda m: timm.optim.create_optimizer_v2(m, "lookahead_adamw", lr=0.01),
}


@pytest.mark.filterwarnings("ignore:penalty")
@pytest.mark.parametrize("comeback", RETURNS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_return_comes_home_on_time_with_every_optimiser(
    make: Callable[[nn.Module], Optimizer], comeback: str
) -> None:
    model = mlp()
    optimizer = make(model)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    start = nn.functional.mse_loss(model(X), Y).item()
    schedule = BypassSchedule(model, optimizer, 20, 30, comeback=comeback, gamma=Linear(1.0), epsilon=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X), Y) + schedule.penalty()
        loss.backward()
        return loss

    while schedule.phase != "done":
        optimizer.step(closure)  # type: ignore[arg-type]
        schedule.step()
    assert schedule.report is not None and schedule.report.left_out == ()
    assert schedule.report.opt2_steps <= 30
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    assert nn.functional.mse_loss(model(X), Y).item() < start
    mlp().load_state_dict(model.state_dict())


def test_the_optimiser_inside_sam_steps_with_lambda_prime_and_is_rolled_back() -> None:
    model = mlp()
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.01)

    def steps(count: int) -> None:
        for _ in range(count):
            for half in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(X), Y).backward()
                half()

    steps(3)
    weights = [*model.parameters()]
    moments = [optimizer.base_optimizer.state[parameter]["exp_avg"].clone() for parameter in weights]
    schedule = BypassSchedule(model, optimizer, 1, 5, lr=1e-9)
    steps(1)
    schedule.step()
    before = [parameter.clone() for parameter in weights]
    steps(1)
    schedule.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(before, weights, strict=True))
    schedule.rollback()
    now = [optimizer.base_optimizer.state[parameter]["exp_avg"] for parameter in weights]
    assert len(optimizer.base_optimizer.state) == len(now) and all(map(torch.equal, moments, now))


def test_an_optimiser_that_holds_another_for_a_part_of_the_model_is_scaled_whole() -> None:
    class Halves(torch.optim.SGD):
        def __init__(self, params: Any, other: Any) -> None:
            super().__init__([*params, *other], 0.1)
            self.aside = torch.optim.Adam(other, 0.1)

    model = mlp()
    optimizer = Halves([*model[0].parameters()], [*model[2].parameters()])
    schedule = BypassSchedule(model, optimizer, 0, 5, lr=1e-9)
    before = model[0].weight.clone()
    nn.functional.mse_loss(model(X), Y).backward()
    optimizer.step()
    schedule.step()
    assert torch.allclose(before, model[0].weight, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_and_the_steps_that_it_skips(fused: bool) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    schedule = BypassSchedule(model, optimizer, 6, 10, comeback="variety")
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=10**6, backoff_factor=1e-9)  # type: ignore[attr-defined]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(16):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(model(X), Y) * 10
        scaler.scale(loss + schedule.penalty()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step(loss)
        if step == 0:  # the gradients overflowed
            assert scaler.get_scale() < 1e30
            assert all(map(torch.equal, before, model.parameters()))
    assert schedule.phase == "done"
    assert schedule.report is not None and schedule.report.left_out == ()


@pytest.mark.filterwarnings("ignore:opt2 ended")
def test_accumulated_and_clipped_gradients_make_the_steps_of_a_whole_batch() -> None:
    ends = []
    for parts in (1, 4):
        published = Penalty(hand_over=False)
        model, optimizer, schedule = begin(6, 8, comeback=published, gamma=Linear(0.01), epsilon=1e-3, snapshot=None)
        for _ in range(14):
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                ((nn.functional.mse_loss(model(x), y) + schedule.penalty()) / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-5)


def averaged(kind: str, model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    if kind == "torch":
        copy: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        return copy, copy.update_parameters
    copy = ModelEmaV3(model, decay=0.5)
    return copy, copy.update


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_averaged_copy_that_rests_during_the_bypass(kind: str) -> None:
    model = mlp()
    copy, update = averaged(kind, model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    update(model)
    schedule = BypassSchedule(model, optimizer, 3, 5)
    until_done(model, optimizer, schedule)
    for _ in range(40):
        update(model)
    for mean, now in zip(copy.module.parameters(), model.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.allclose(mean, now, atol=1e-6)


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_averaged_copy_that_is_extended_along_averages_through_the_bypass(kind: str) -> None:
    model = mlp()
    copy, update = averaged(kind, model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    update(model)
    schedule = BypassSchedule(model, optimizer, 6, 10)
    bypass_fx.extend(copy.module, bypass_fx.plan(mlp()))  # type: ignore[arg-type]
    means = [torch.zeros_like(delta) for delta in deltas(model)]
    while len(schedule.out) == 2:
        now = [delta.detach().clone() for delta in deltas(model)]
        update(model)
        means = [(mean + delta) / 2 for mean, delta in zip(means, now, strict=True)]
        for mean, delta in zip(means, deltas(copy.module), strict=True):  # type: ignore[arg-type]
            assert torch.allclose(mean, delta, atol=1e-6)
        train_step(model, optimizer, schedule)
    bypass_fx.contract(copy.module)  # type: ignore[arg-type]
    until_done(model, optimizer, schedule)
    for _ in range(40):
        update(model)
    assert all(map(torch.allclose, copy.module.parameters(), model.parameters()))  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_averaged_copy_made_during_the_bypass_is_contracted_like_the_model(kind: str) -> None:
    model, optimizer, schedule = begin(6, 10)
    for _ in range(3):
        train_step(model, optimizer, schedule)
    copy, update = averaged(kind, model)
    train_step(model, optimizer, schedule)
    update(model)
    bypass_fx.contract(copy.module)  # type: ignore[arg-type]
    assert not surgery.is_extended(copy)
    mlp().load_state_dict(copy.module.state_dict())  # type: ignore[union-attr]
    assert surgery.is_extended(model)
