"""Promises of D's parameter group: it behaves like the user's own groups, and leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import timm.scheduler
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from bypass_fx import param_group
from bypass_fx.passes.errors import BypassError

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "adam tensor lr": lambda p: torch.optim.Adam(p, torch.tensor(0.1), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),
    "timm lamb": lambda p: timm.optim.create_optimizer_v2(p, "lamb", lr=0.1, max_grad_norm=None),
    "timm lion": lambda p: timm.optim.create_optimizer_v2(p, "lion", lr=0.1),
    "timm lookahead": lambda p: timm.optim.create_optimizer_v2(p, "lookahead_adamw", lr=0.1),
}

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 20)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 20),
}


pytestmark = pytest.mark.usefixtures("small_heap")


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))]


def deltas() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))]


def step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def snapshot(value: Any) -> Any:
    state = copy.deepcopy(value.state_dict())
    for group in state["param_groups"]:  # counters of steps, which every step moves
        for counter in ("step", "lookahead_step"):
            group.pop(counter, None)
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_d_moves_with_the_first_groups_settings_and_leaves_nothing_behind(make: Make) -> None:
    params, d = parameters(), deltas()
    optimizer = make(params)
    step(optimizer, params)
    before, group, states = snapshot(optimizer), optimizer.param_groups[0], dict(optimizer.state)

    param_group.add(optimizer, d, like=params)
    extra = optimizer.param_groups[-1]
    assert extra.keys() | {"step"} == group.keys() | {"step"}
    assert float(extra["lr"]) == float(group["lr"])
    assert extra.get("weight_decay", 0.0) == 0.0
    step(optimizer, d)
    assert all(delta.abs().min() > 0 for delta in d)
    d[0].grad = torch.ones(4)

    param_group.remove(optimizer, d)
    assert same(snapshot(optimizer), before)
    assert optimizer.param_groups[0] is group
    assert dict(optimizer.state).keys() == states.keys()
    assert all(optimizer.state[key] is value for key, value in states.items())
    assert d[0].grad is None


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_other_parameters_train_on_as_if_d_had_never_been_there(make: Make) -> None:
    params, d = parameters(), deltas()
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in params]
    optimizer, plain = make(params), make(twins)
    for i in range(6):
        if i == 2:
            param_group.add(optimizer, d, like=params)
        if i == 4:
            param_group.remove(optimizer, d)
        step(optimizer, [*params, *(d if 2 <= i < 4 else [])])
        step(plain, twins)
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("made", ["before", "after"])
def test_lr_schedulers_go_on_working_and_ds_rate_follows(
    schedule: Callable[[torch.optim.Optimizer], Any], made: str
) -> None:
    params, d, twins = parameters(), deltas(), parameters()
    optimizer, plain = torch.optim.SGD(params, 0.1, momentum=0.9), torch.optim.SGD(twins, 0.1, momentum=0.9)
    driver = schedule(optimizer) if made == "before" else None
    param_group.add(optimizer, d, like=params)
    driver = driver or schedule(optimizer)
    reference = schedule(plain)
    rates = []
    for i in range(10):
        if i == 6:
            param_group.remove(optimizer, d)
        step(optimizer, [*params, *(d if i < 6 else [])])
        step(plain, twins)
        driver.step()
        reference.step()
        rates.append(plain.param_groups[0]["lr"])
        assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * (2 if i < 6 else 1)
    assert len(set(rates)) > 1
    assert same(optimizer.param_groups[0]["momentum"], plain.param_groups[0]["momentum"])


def test_reduce_on_plateau_reduces_ds_rate_too() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.SGD(params, 0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.01])
    param_group.add(optimizer, d, like=params)
    for _ in range(4):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01])
    param_group.remove(optimizer, d)
    scheduler.step(2.0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["adamw", "lookahead_adamw"])
@pytest.mark.parametrize("kind", ["cosine", "step", "plateau"])
def test_timms_schedulers_go_on_working_and_ds_rate_follows(kind: str, name: str) -> None:
    params, d = parameters(), deltas()
    optimizer = timm.optim.create_optimizer_v2(params, name, lr=0.1)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, kind, num_epochs=9, warmup_epochs=3, warmup_lr=0.01)
    param_group.add(optimizer, d, like=params)
    rates = set()
    for epoch in range(1, 8):
        scheduler.step(epoch, metric=1.0)
        rate, own = (group["lr"] for group in optimizer.param_groups)
        assert own == rate
        rates.add(rate)
    assert len(rates) > 2
    param_group.remove(optimizer, d)
    scheduler.step(8, metric=1.0)
    assert len(optimizer.param_groups) == len(scheduler.base_values) == 1


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_ds_own_rate_keeps_its_ratio_under_a_scheduler(schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.SGD(params, 0.1, momentum=0.9)
    driver = schedule(optimizer)
    first = param_group.base_lr(optimizer.param_groups[0])
    param_group.add(optimizer, d, like=params, lr=3 * first)
    for _ in range(6):
        step(optimizer, [*params, *d])
        driver.step()
        rate, own = (group["lr"] for group in optimizer.param_groups)
        assert own == pytest.approx(3 * rate)


def test_ds_own_rate_keeps_its_ratio_where_weights_are_averaged() -> None:
    weight, delta = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    param_group.add(optimizer, [delta], like=[weight], lr=1.0)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.1])


def test_ds_own_rate_and_weight_decay_are_taken() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.AdamW(params, 0.1)
    param_group.add(optimizer, d, like=params, lr=0.5, weight_decay=0.2)
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["weight_decay"]) == (0.5, 0.2)


def test_an_optimiser_that_counts_steps_per_group_counts_ds_from_the_start() -> None:
    params, d, fresh = parameters(), deltas(), deltas()
    optimizer, own = OPTIMIZERS["timm lamb"](params), OPTIMIZERS["timm lamb"](fresh)
    for _ in range(5):
        step(optimizer, params)
    param_group.add(optimizer, d, like=params)
    step(optimizer, d)
    step(own, fresh)
    assert all(map(torch.equal, d, fresh))


def test_a_tensor_learning_rate_is_not_shared_with_ds_group() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.Adam(params, torch.tensor(0.1))
    param_group.add(optimizer, d, like=params)
    optimizer.param_groups[0]["lr"].fill_(9.0)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1)


def test_d_takes_after_the_first_group_that_belongs_to_the_model() -> None:
    other, params, d = parameters(), parameters(), deltas()
    optimizer = torch.optim.SGD([{"params": other, "lr": 7.0}, {"params": params, "lr": 0.3}], 1.0)
    param_group.add(optimizer, d, like=params)
    assert optimizer.param_groups[-1]["lr"] == 0.3


def test_an_optimiser_built_from_the_extended_model_gives_d_a_group_of_its_own() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.AdamW([*params, *d], 0.1)
    step(optimizer, [*params, *d])
    moments = optimizer.state[d[0]]
    param_group.add(optimizer, d, like=[*params, *d])
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert optimizer.state[d[0]] is moments
    param_group.remove(optimizer, d)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    assert len(optimizer.state) == 2


def test_a_group_that_the_user_made_for_d_is_kept_as_it_is() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.AdamW([{"params": params}, {"params": d, "lr": 0.7, "weight_decay": 0.3}], 0.1)
    param_group.add(optimizer, d, like=params)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.01), (0.7, 0.3)]
    param_group.remove(optimizer, d)
    assert len(optimizer.param_groups) == 1


def test_named_parameters_stay_named() -> None:
    (weight, bias), d = parameters(), deltas()
    optimizer = torch.optim.SGD([("weight", weight), ("bias", bias)], 0.1)
    param_group.add(optimizer, d, like=[weight], names=["act.delta", "act2.delta"])
    assert optimizer.param_groups[1]["param_names"] == ["act.delta", "act2.delta"]
    param_group.remove(optimizer, d)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_optimiser_state_can_be_saved_and_loaded_with_d_in_it() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.Adam(params, 0.1)
    param_group.add(optimizer, d, like=params)
    step(optimizer, [*params, *d])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)  # puts new dicts in the place of the groups
    param_group.remove(optimizer, d)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    assert optimizer.state.keys() == set(params)


def test_a_scheduler_state_saved_with_d_is_not_changed_when_d_leaves() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.Adam(params, 0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    param_group.add(optimizer, d, like=params)
    saved = scheduler.state_dict()
    param_group.remove(optimizer, d)
    assert len(saved["base_lrs"]) == 2
    assert len(scheduler.base_lrs) == 1


def test_another_optimisers_scheduler_is_left_alone() -> None:
    params, d, other = parameters(), deltas(), torch.optim.SGD(parameters(), 0.1)
    scheduler = lr_scheduler.ExponentialLR(other, 0.9)
    optimizer = torch.optim.SGD(params, 0.1)
    param_group.add(optimizer, d, like=params)
    assert len(scheduler.base_lrs) == 1


def test_lbfgs_trains_d_and_trains_on_without_it() -> None:
    params, d = [nn.Parameter(torch.ones(3))], [nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.LBFGS(params, line_search_fn="strong_wolfe")
    group = optimizer.param_groups[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        with_d = sum(delta.sum() for delta in group["params"][1:])
        loss = ((params[0] + with_d - torch.arange(3.0)) ** 2).sum() + (torch.as_tensor(with_d) - 5) ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    param_group.add(optimizer, d, like=params)
    optimizer.step(closure)
    assert torch.cat(list(d)).sum().item() == pytest.approx(5, abs=1e-3)
    param_group.remove(optimizer, d)
    assert len(group["params"]) == 1
    optimizer.step(closure)
    assert torch.allclose(params[0], torch.arange(3.0), atol=1e-3)
    with pytest.raises(BypassError, match="leave out delta_lr"):
        param_group.add(optimizer, d, like=params, lr=0.1)


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_scaled_rate_moves_parameters_by_the_factor_and_shows_the_users_rate_between_steps(tensor_rate: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], torch.tensor(0.5) if tensor_rate else 0.5, foreach=False)
    rate = optimizer.param_groups[0]["lr"]
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaled = param_group.ScaledRate(optimizer, lambda group: 0.1)
    moves = []
    for i in range(4):
        if i == 2:
            scaled.remove()
        before = weight.detach().clone()
        step(optimizer, [weight])
        moves.append((before - weight).max().item())
        scheduler.step()
    assert moves == pytest.approx([0.05, 0.025, 0.125, 0.0625])
    assert float(optimizer.param_groups[0]["lr"]) == 0.5**5
    assert not tensor_rate or optimizer.param_groups[0]["lr"] is rate


def test_a_step_that_raises_does_not_leave_the_scaled_rate_behind() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 0.5)
    scaled = param_group.ScaledRate(optimizer, lambda group: 0.1)

    def closure() -> float:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
    scaled.remove()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimiser_of_another_model_is_refused() -> None:
    with pytest.raises(BypassError, match=r"none of the model's parameters; build it from"):
        param_group.expect_optimizer(torch.optim.SGD(parameters(), 0.1), iter(parameters()))


def test_muon_is_refused_with_the_optimiser_to_take_instead() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(BypassError, match="pass the optimiser that holds the biases"):
        param_group.expect_optimizer(torch.optim.Muon([weight]), [weight])


def test_what_is_no_optimiser_is_refused() -> None:
    with pytest.raises(BypassError, match=r"no torch\.optim\.Optimizer"):
        param_group.expect_optimizer(object(), parameters())  # type: ignore[arg-type]


def test_a_rate_for_d_beside_a_rate_of_zero_is_refused_and_changes_nothing() -> None:
    params, d = parameters(), deltas()
    optimizer = torch.optim.SGD(params, 0.0)
    with pytest.raises(BypassError, match="above 0"):
        param_group.add(optimizer, d, like=params, lr=0.1)
    assert len(optimizer.param_groups) == 1
