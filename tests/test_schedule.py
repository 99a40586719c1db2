"""Promises of the schedule: the phases, the arrivals, the contraction, the learning rates, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import bypass_fx
from bypass_fx import comeback, constraint, surgery
from bypass_fx.gamma import Linear, PiecewiseLinear
from bypass_fx.passes.errors import BypassError
from bypass_fx.schedule import Arrival, BypassSchedule, NonFiniteError
from tests import bypasses
from tests.bypasses import X, Y, adam, begin, deltas, mlp, train_step, until_done

pytestmark = pytest.mark.usefixtures("small_heap")

# The life of a bypass


def test_the_phases_take_the_steps_they_were_given() -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=5)
    phases = [schedule.phase]
    for _ in range(10):
        train_step(model, optimizer, schedule)
        phases.append(schedule.phase)
    assert phases == ["opt1"] * 3 + ["opt2"] * 5 + ["done"] * 3
    assert schedule.steps == 8


def test_opt1_of_zero_steps_starts_with_the_comeback() -> None:
    _, _, schedule = begin(opt1=0)
    assert schedule.phase == "opt2"


def test_the_contracted_model_is_the_original_architecture_and_the_optimiser_is_the_users_again() -> None:
    model, optimizer, plain = mlp(), None, mlp()
    optimizer = adam(model)
    parameters, group = list(model.parameters()), optimizer.param_groups[0]
    schedule = BypassSchedule(model, optimizer, 3, 5)
    assert surgery.is_extended(model)
    assert len(optimizer.param_groups) == 2
    until_done(model, optimizer, schedule)
    assert not surgery.is_extended(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(model.state_dict())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.param_groups == [group]
    assert set(optimizer.state) == set(parameters)
    for _ in range(2):
        train_step(model, optimizer, schedule)  # train3, in the same loop
    assert optimizer.state[parameters[0]]["step"] == 10


def test_penalty_is_zero_and_no_norm_is_computed_outside_opt2(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, schedule = begin(opt1=2, comeback="penalty", gamma=Linear(10.0), epsilon=1e9)
    with monkeypatch.context() as patch:
        patch.setattr(constraint, "residual", None)
        for _ in range(2):
            assert schedule.penalty().item() == 0
            train_step(model, optimizer, schedule)
    train_step(model, optimizer, schedule)
    assert schedule.phase == "done"
    assert schedule.penalty().item() == 0
    assert schedule.penalty().shape == ()


def test_adding_to_a_penalty_in_place_does_not_change_the_next() -> None:
    _, _, schedule = begin()
    term = schedule.penalty()
    term += 1
    assert schedule.penalty().item() == 0


def test_the_penalty_is_gamma_of_t_times_the_norms_with_t_counted_from_the_start_of_opt2() -> None:
    published = comeback.Penalty(hand_over=False)
    model, optimizer, schedule = begin(opt1=2, opt2=4, comeback=published, gamma=Linear(0.5), at_budget="continue")
    weight, seen = schedule.gamma, []
    for _ in range(6):
        if schedule.phase == "opt2":
            expected = schedule.gamma * sum(bypass_fx.norms(model).values(), torch.zeros(()))
            assert torch.allclose(schedule.penalty(), expected)
            seen.append(schedule.gamma.item())
        train_step(model, optimizer, schedule)
    assert seen == [0.0, 0.5, 1.0, 1.5]
    assert schedule.gamma is weight  # in place: another object would recompile a compiled loss


def test_t_counts_epochs_in_fractions_where_asked() -> None:
    arguments = {"gamma": PiecewiseLinear((1.0, 10.0), (0.5,)), "unit": "epoch", "steps_per_epoch": 4}
    model, optimizer, schedule = begin(opt1=0, opt2=9, comeback="penalty", epsilon=1e-12, **arguments)
    seen = []
    for _ in range(5):
        seen.append(schedule.gamma.item())
        train_step(model, optimizer, schedule)
    assert seen == [0.0, 0.25, 0.5, 3.0, 5.5]


def test_gamma_is_as_precise_as_a_double_model() -> None:
    model = mlp().double()
    schedule = BypassSchedule(model, adam(model), 0, 5, comeback="penalty", gamma=lambda t: t + 0.1)
    assert schedule.gamma.item() == 0.1


# Arrivals


def test_each_site_arrives_on_its_own_and_stays_at_exactly_zero() -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=50, comeback="penalty", gamma=Linear(0.01), epsilon=1e-3)
    for _ in range(3):
        train_step(model, optimizer, schedule)
    first, second = deltas(model)
    with torch.no_grad():
        first.mul_(0)
    schedule.step()
    assert schedule.out == {"3"}
    for _ in range(5):
        train_step(model, optimizer, schedule)
        assert (first == 0).all()
        assert (second != 0).any()
    assert schedule.phase == "opt2"
    assert torch.allclose(schedule.penalty(), schedule.gamma * bypass_fx.norms(model)["3"])


def test_a_strict_site_that_arrives_with_d_unequal_zero_is_folded_without_changing_the_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight[2:] = 0  # what D does to units 2 and 3 is then a constant
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    schedule = BypassSchedule(model, optimizer, 0, 9, comeback="proximal", gamma=Linear(1.0))
    (delta,) = deltas(model)
    x, bias = torch.randn(7, 2, dtype=torch.float64), model[2].bias.detach().clone()
    with torch.no_grad():
        delta.copy_(torch.tensor([0.0, 0.0, 0.7, -0.4]))
        before = model(x)
    schedule.step()
    assert schedule.phase == "done"
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-14)
    assert not torch.equal(model[2].bias, bias)


def test_the_report_tells_each_sites_step_and_norm_of_arrival() -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=5)
    assert schedule.report is None
    until_done(model, optimizer, schedule)
    report = schedule.report
    assert report is not None
    assert (report.comeback, report.opt1_steps, report.opt2_steps) == ("homotopy", 3, 5)
    assert report.arrivals == (Arrival("1", 5, 0.0), Arrival("3", 5, 0.0))
    assert report.left_out == ()


def test_at_the_end_of_the_budget_sites_still_out_are_contracted_with_a_warning_and_an_entry() -> None:
    published = comeback.Penalty(hand_over=False)
    model, optimizer, schedule = begin(opt1=3, opt2=4, comeback=published, gamma=Linear(1e-6), epsilon=1e-6)
    with pytest.warns(UserWarning, match="opt2 ended after its 4 steps with 2 of 2 sites still out") as warned:
        until_done(model, optimizer, schedule)
    assert warned[0].filename == bypasses.__file__  # the line that calls step
    assert schedule.report is not None
    assert [(arrival.site, arrival.step) for arrival in schedule.report.left_out] == [("1", 4), ("3", 4)]
    assert min(arrival.norm for arrival in schedule.report.left_out) > 1e-6
    assert not surgery.is_extended(model)


def test_at_budget_continue_goes_on_until_every_site_has_arrived() -> None:
    model, optimizer, schedule = begin(
        3, 2, comeback=comeback.Proximal(landing=0), gamma=Linear(0.3), at_budget="continue"
    )
    until_done(model, optimizer, schedule)
    assert schedule.report is not None
    assert schedule.report.opt2_steps > 2
    assert len(schedule.report.arrivals) == 2


def test_finish_contracts_at_once_in_any_phase() -> None:
    for steps, phase in ((2, "opt1"), (4, "opt2"), (8, "done")):
        model, optimizer, schedule = begin(opt1=3, opt2=5)
        for _ in range(steps):
            train_step(model, optimizer, schedule)
        assert schedule.phase == phase
        report = schedule.finish()
        assert report is schedule.report
        assert len(report.left_out) == (0 if phase == "done" else 2)
        assert not surgery.is_extended(model)
        assert len(optimizer.param_groups) == 1


def test_finish_keeps_the_outcome_and_begins_no_further_cycle() -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=5, cycles=3, accept=lambda model: False)
    train_step(model, optimizer, schedule)
    assert schedule.finish().rolled_back == ""
    assert (schedule.phase, len(schedule.reports)) == ("done", 1)
    assert not surgery.is_extended(model)
    assert len(optimizer.param_groups) == 1


def test_finish_goes_back_to_theta_star_where_the_model_is_not_finite() -> None:
    model, _, schedule = begin(opt1=3, opt2=5)
    start = model[0].bias.detach().clone()
    model[0].bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="θ\\* again"):
        schedule.finish()
    assert schedule.phase == "done"
    assert not surgery.is_extended(model)
    assert torch.equal(model[0].bias, start)


# Learning rates


def test_in_opt2_the_model_moves_with_lambda_prime_and_before_and_after_with_lambda() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = BypassSchedule(model, optimizer, 2, 2, lr=0.02)
    moved = []
    for _ in range(6):
        weight = model[0].weight
        before = weight.detach().clone()
        train_step(model, optimizer, schedule)
        assert weight.grad is not None
        moved.append(((before - weight) / weight.grad).median().item())
        assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert moved == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.1, 0.1], rel=1e-2)


def test_lambda_prime_follows_an_lr_scheduler() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    driver = lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    schedule = BypassSchedule(model, optimizer, 1, 2, lr=0.02)
    rates = []
    optimizer.register_step_pre_hook(lambda o, a, k: rates.append(o.param_groups[0]["lr"]))
    for _ in range(4):
        train_step(model, optimizer, schedule)
        driver.step()
        if schedule.steps == 1:  # hooks run in the order they came, and λ' came in just now
            optimizer.register_step_pre_hook(lambda o, a, k: rates.append(o.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.1, 0.05, 0.01, 0.025, 0.005, 0.0125, 0.0125])


def test_proximal_lowers_the_norm_by_lambda_prime_times_gamma() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = BypassSchedule(model, optimizer, 0, 9, comeback="proximal", gamma=lambda t: 3.0, lr=0.02)
    with torch.no_grad():
        for delta in deltas(model):
            delta.fill_(0.5)
    before = bypass_fx.norms(model)
    schedule.step()
    assert schedule.norms == pytest.approx({name: norm.item() - 0.02 * 3.0 for name, norm in before.items()})
    assert schedule.norms == pytest.approx({name: norm.item() for name, norm in bypass_fx.norms(model).items()})


def test_ds_own_learning_rate_and_weight_decay_reach_its_group() -> None:
    _, optimizer, _ = begin(delta_lr=0.5, delta_weight_decay=0.25)
    assert (optimizer.param_groups[1]["lr"], optimizer.param_groups[1]["weight_decay"]) == (0.5, 0.25)


@pytest.mark.parametrize("name", ["homotopy", "proximal"])
def test_lbfgs_takes_the_whole_way(name: str) -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    schedule = BypassSchedule(model, optimizer, 4, 8, comeback=name, gamma=Linear(10.0), at_budget="continue")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X), Y) + schedule.penalty()
        loss.backward()
        return loss

    losses = []
    while schedule.steps < 4 or schedule.phase != "done":
        losses.append(optimizer.step(closure).item())
        schedule.step()
    losses += [optimizer.step(closure).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert len(optimizer.param_groups[0]["params"]) == 6


# The model may be extended already


def test_a_model_that_is_extended_already_is_taken_as_it_is() -> None:
    model = bypass_fx.extend(mlp(), select="3")
    optimizer = adam(model)
    schedule = BypassSchedule(model, optimizer, 3, 5)
    assert schedule.out == {"3"}
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1]


def test_a_plan_or_its_arguments_choose_the_sites() -> None:
    model = mlp()
    plan = bypass_fx.plan(model, select="1")
    assert BypassSchedule(model, adam(model), 3, 5, plan=plan).out == {"1"}
    assert begin(select="3")[2].out == {"3"}


def test_a_model_extended_already_takes_no_plan() -> None:
    model = bypass_fx.extend(mlp())
    with pytest.raises(BypassError, match=r"extended already.*leave out plan="):
        BypassSchedule(model, adam(model), 3, 5, mode="all")


def test_several_bypasses_follow_one_another() -> None:
    model, optimizer, schedule = begin(2, 3)
    for _ in range(2):
        until_done(model, optimizer, schedule)
        schedule = BypassSchedule(model, optimizer, 2, 3)
    assert schedule.phase == "opt1"
    assert len(optimizer.param_groups) == 2


# What a step costs


@pytest.mark.parametrize(("steps", "count"), [(1, 0), (2, 1), (5, 1)])
def test_a_step_brings_numbers_to_the_host_once_at_most(
    steps: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, schedule = begin(opt1=3, opt2=9, comeback="proximal", gamma=Linear(1e-3))
    for _ in range(steps):
        train_step(model, optimizer, schedule)
    reads: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        read: Callable[..., Any] = getattr(Tensor, name)

        def watch(*arguments: Any) -> Any:
            reads.append(name)
            return read(*arguments)

        return watch

    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, watched(name))
    schedule.step()
    assert reads == ["tolist"] * count


@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:penalty")
@pytest.mark.parametrize(
    ("kind", "needed"), [("penalty", 3), ("proximal", 2), ("homotopy", 2), ("lagrangian", 3), ("variety", 2)]
)
def test_a_compiled_loss_needs_a_graph_for_each_way_its_terms_can_be_whatever_t_the_arrivals_and_the_cycles(
    kind: str, needed: int
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    model, optimizer, schedule = begin(
        3, 12, comeback=kind, gamma=Linear(0.01), epsilon=1e-3, rest=2, cycles=2, penalty_every=1
    )
    loss_of = torch.compile(lambda x, y: nn.functional.mse_loss(model(x), y) + schedule.penalty(), backend=backend)
    outs = []
    for i in range(35):
        optimizer.zero_grad()
        loss_of(X, Y).backward()
        optimizer.step()
        if i == 7:
            with torch.no_grad():
                deltas(model)[0].zero_()
        schedule.step()
        outs.append((schedule.phase, len(schedule.out)))
    assert {("opt1", 2), ("opt2", 2), ("opt2", 1), ("train3", 0), ("done", 0)} == set(outs)
    assert len(schedule.reports) == 2
    assert len(graphs) == needed
