"""Replicas do what each of them would do alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import bypass_fx
from bypass_fx.bypass_report import NonFiniteError
from bypass_fx.joint_step import RULES
from bypass_fx.passes.errors import BypassError
from bypass_fx.replicas import Replicas
from bypass_fx.schedule import BypassSchedule
from tests.alongside import (
    COUNT,
    OPTIMISERS,
    Alone,
    Optimise,
    adam,
    batch_at,
    batches_at,
    expect_same,
    lead,
    loss_fn,
    normed,
    seeds,
    sgd,
    together,
)  # fmt: skip


@pytest.mark.parametrize("name", OPTIMISERS)
def test_plain_training_is_that_of_each_alone(name: str) -> None:
    models = seeds()
    expect_same(together(models, OPTIMISERS[name]), Alone(models, OPTIMISERS[name]), range(6))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_the_optimisers_can_go_on_alone_and_come_back(name: str) -> None:
    models, optimise = seeds(), OPTIMISERS[name]
    replicas, alone = together(models, optimise), Alone(models, optimise)
    expect_same(replicas, alone, range(3))
    for optimizer in replicas.optimizers:
        optimizer.zero_grad()
    replicas.backward(loss_fn, batches_at(3))
    for optimizer in replicas.optimizers:
        optimizer.step()
    alone.step(3)
    expect_same(replicas, alone, range(4, 7))


@pytest.mark.parametrize("optimise", [sgd, adam])
@pytest.mark.parametrize("comeback", ["homotopy", "proximal", "penalty", "published", "lagrangian", "variety"])
@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:penalty")
def test_every_return_in_phases_of_their_own(comeback: str, optimise: Optimise) -> None:
    models = seeds()
    replicas, alone = together(models, optimise), Alone(models, optimise)

    def begin(row: int, model: nn.Module, optimizer: Optimizer) -> BypassSchedule | None:
        return None if row == 1 else BypassSchedule(
            model, optimizer, opt1=2 + row, opt2=8, gamma=bypass_fx.Linear(0.02), comeback=comeback, lr=4e-3,
            epsilon=1e-9, cycles=2, rest=1,
        )  # fmt: skip

    lead(replicas, alone, begin)
    met = expect_same(replicas, alone, range(30))
    assert len(set(met)) > 8 and any(len({*phases} - {""}) == 3 for phases in met)
    assert not replicas.walking


@pytest.mark.parametrize("comeback", ["proximal", "published"])
@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:penalty")
def test_sites_that_arrive_one_by_one(comeback: str) -> None:
    models = seeds()[::-1]
    replicas, alone = together(models, adam), Alone(models, adam)

    def begin(row: int, model: nn.Module, optimizer: Optimizer) -> BypassSchedule:
        return BypassSchedule(
            model,
            optimizer,
            opt1=4,
            opt2=30,
            gamma=bypass_fx.Linear(0.3),
            epsilon=0.01,
            comeback=comeback,
            mode="all",
        )

    lead(replicas, alone, begin)
    expect_same(replicas, alone, range(34))
    reports = [schedule.report for schedule in replicas.schedules if schedule]
    steps = [[arrival.step for arrival in report.arrivals] for report in reports if report]
    assert any(len({*each}) > 1 for each in steps), "no replica met a site that arrived before another"


def test_batch_norm_keeps_each_replicas_statistics() -> None:
    models = seeds(normed)
    replicas, alone = together(models, adam), Alone(models, adam)
    lead(replicas, alone, lambda row, m, o: BypassSchedule(m, o, opt1=1 + 2 * row, opt2=3, mode="all"))
    met = expect_same(replicas, alone, range(12), (1, 4, 4))
    assert len(set(met)) > 4
    assert all(int(model[1].num_batches_tracked) == 12 for model in replicas.models)  # type: ignore[index]
    means = torch.stack([model[1].running_mean for model in replicas.models])  # type: ignore[index, misc]
    assert means.std(dim=0).amin() > 0


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("comeback", ["homotopy", "published"])
@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:penalty")
def test_portions_change_nothing(at_once: int, comeback: str) -> None:
    models = seeds(normed)
    replicas, alone = together(models, adam, at_once), Alone(models, adam)

    def begin(row: int, model: nn.Module, optimizer: Optimizer) -> BypassSchedule:
        gamma = bypass_fx.Linear(1.0 + row)
        return BypassSchedule(model, optimizer, opt1=1 + row % 2, opt2=3, gamma=gamma, comeback=comeback, mode="all")

    lead(replicas, alone, begin)
    expect_same(replicas, alone, range(6), (1, 4, 4))


def test_dropout_draws_for_each_replica() -> None:
    model = nn.Sequential(nn.Linear(6, 400), nn.Dropout(0.5), nn.Linear(400, 2)).double()
    replicas = together([model] * COUNT, sgd)
    batch = batch_at(0, 0)
    torch.manual_seed(0)
    losses = replicas.backward(loss_fn, batch, shared=True)
    assert len(set(losses.tolist())) == COUNT
    torch.manual_seed(0)
    assert torch.equal(losses, replicas(loss_fn, batch, shared=True))
    replicas.train(False)
    quiet = replicas(loss_fn, batch, shared=True)
    torch.testing.assert_close(quiet, loss_fn(copy.deepcopy(model).eval(), batch).detach().expand(COUNT))


def test_a_shared_batch_is_everyones() -> None:
    models = seeds()
    replicas = together(models, sgd)
    losses = replicas.backward(loss_fn, batch_at(0, 0), shared=True)
    torch.testing.assert_close(losses, torch.stack([loss_fn(model, batch_at(0, 0)).detach() for model in models]))
    outputs = replicas(lambda model, x: {"out": model(x)}, batch_at(0, 0)[0], shared=True)
    assert outputs["out"].shape == (COUNT, 16, 2)


def test_frozen_and_tied_parameters_stay_so() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.second.weight = self.first.weight
            self.third.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.third(torch.relu(self.second(torch.tanh(self.first(x)))))
            return out

    models = seeds(Tied)
    replicas, alone = together(models, adam), Alone(models, adam)
    lead(replicas, alone, lambda row, m, o: BypassSchedule(m, o, opt1=1 + row, opt2=3, mode="all"))
    expect_same(replicas, alone, range(8))
    assert all(model.second.weight is model.first.weight for model in replicas.models)


def test_what_is_not_accepted_goes_back_to_its_own_start() -> None:
    models = seeds()
    replicas, alone = together(models, adam), Alone(models, adam)
    expect_same(replicas, alone, range(2))

    def begin(row: int, model: nn.Module, optimizer: Optimizer) -> BypassSchedule:
        return BypassSchedule(model, optimizer, opt1=2, opt2=3, accept=lambda model: row % 2, cycles=2)

    lead(replicas, alone, begin)
    start = replicas.values.clone()
    expect_same(replicas, alone, range(2, 7))
    assert [torch.equal(*pair) for pair in zip(start, replicas.values, strict=True)] == [True, False] * 2
    expect_same(replicas, alone, range(7, 14))


def test_one_that_diverges_leaves_the_others_alone() -> None:
    models = seeds()
    replicas, alone = together(models, sgd), Alone(models, sgd)
    lead(replicas, alone, lambda row, m, o: BypassSchedule(m, o, opt1=3, opt2=3))
    losses = replicas.backward(loss_fn, batches_at(0))
    replicas.gradients[2] = torch.inf
    replicas.step(losses)
    assert not replicas.failures  # all that moves is looked at in every few steps, but the loss in each
    replicas.step(replicas.backward(loss_fn, batches_at(1)))
    assert [*replicas.failures] == [2] and isinstance(replicas.failures[2], NonFiniteError)
    torch.testing.assert_close([*replicas.models[2].parameters()], [*models[2].parameters()])
    for step in range(8):
        if step > 1:
            replicas.step(replicas.backward(loss_fn, batches_at(step)))
        alone.step(step)
    for row in (0, 1, 3):
        torch.testing.assert_close(replicas.models[row].state_dict(), alone.models[row].state_dict())
    assert not replicas.walking


def test_one_without_a_way_back_does_not_stop_the_others() -> None:
    replicas = together(seeds(), sgd)
    replicas.lead(lambda model, optimizer: BypassSchedule(model, optimizer, opt1=2, opt2=2, snapshot=None))
    losses = replicas.backward(loss_fn, batches_at(0))
    losses[1] = torch.nan
    replicas.step(losses)
    for step in range(1, 4):
        replicas.step(replicas.backward(loss_fn, batches_at(step)))
    assert [*replicas.failures] == [1] and not replicas.walking
    assert [schedule.phase for schedule in replicas.schedules if schedule] == ["done", "opt1", "done", "done"]


def test_a_deep_copy_goes_its_own_way_from_the_same_place() -> None:
    models = seeds()
    replicas, alone = together(models, adam), Alone(models, adam)
    expect_same(replicas, alone, range(3))
    twin = copy.deepcopy(replicas)
    for step in range(3, 6):
        twin.step(twin.backward(loss_fn, batches_at(step)))
    expect_same(replicas, alone, range(3, 6))
    assert torch.equal(twin.values, replicas.values)
    twin.values.zero_()
    assert replicas.values.abs().amin(dim=1).sum() > 0


def test_states_loaded_into_the_ordinary_objects_are_taken_over() -> None:
    models = seeds()
    replicas, alone = together(models, adam), Alone(models, adam)
    expect_same(replicas, alone, range(3))
    states = copy.deepcopy(
        [(m.state_dict(), o.state_dict()) for m, o in zip(replicas.models, replicas.optimizers, strict=True)]
    )
    replicas.step(replicas.backward(loss_fn, batches_at(9)))
    for row, (of_model, of_optimizer) in enumerate(states):
        replicas.models[row].load_state_dict(of_model)
        replicas.optimizers[row].load_state_dict(of_optimizer)
    expect_same(replicas, alone, range(3, 6))


def test_learning_rates_and_their_schedulers_are_each_replicas_own() -> None:
    models = seeds()
    replicas, alone = together(models, adam), Alone(models, adam)
    drivers = []
    for optimizers in (replicas.optimizers, alone.optimizers):
        for row, optimizer in enumerate(optimizers):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + row)
            optimizer.param_groups[0]["weight_decay"] = 0.1 * row
            drivers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    for step in range(4):
        expect_same(replicas, alone, range(step, step + 1))
        for driver in drivers:
            driver.step()
    assert [o.param_groups[0]["lr"] for o in replicas.optimizers] == [1e-3 * (1 + row) / 16 for row in range(COUNT)]


def test_numbers_that_no_rule_tells_apart_are_each_replicas_own() -> None:
    models = seeds()
    replicas, alone = together(models, adam), Alone(models, adam)
    for optimizers in (replicas.optimizers, alone.optimizers):
        for row, optimizer in enumerate(optimizers):
            optimizer.param_groups[0]["betas"] = (0.9 - 0.2 * row, 0.99)
    expect_same(replicas, alone, range(4))


def test_groups_of_parameters_keep_their_own_numbers() -> None:
    def optimise(parameters: Any) -> Optimizer:
        biases, weights = [], []
        for parameter in parameters:
            (biases if parameter.dim() == 1 else weights).append(parameter)
        return torch.optim.AdamW([{"params": weights, "weight_decay": 0.5}, {"params": biases, "lr": 0.03}], 0.01)

    models = seeds()
    replicas, alone = together(models, optimise), Alone(models, optimise)
    lead(replicas, alone, lambda row, m, o: BypassSchedule(m, o, opt1=1 + row, opt2=3))
    expect_same(replicas, alone, range(8))


def test_norms_are_those_of_each_model() -> None:
    replicas = together(seeds(), adam)
    replicas.lead(lambda m, o: None if m is replicas.models[0] else BypassSchedule(m, o, opt1=9, opt2=9))
    for step in range(3):
        replicas.step(replicas.backward(loss_fn, batches_at(step)))
    norms = replicas.norms()
    for row, model in enumerate(replicas.models[1:], 1):
        own = bypass_fx.norms(model)
        torch.testing.assert_close({name: norm[row] for name, norm in norms.items()}, own)
    assert all(norm[0] == 0 and norm[1:].amin() > 0 for norm in norms.values())


def test_every_rule_steps_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in RULES:
        replicas = together(seeds(), lambda parameters, kind=kind: kind(parameters, lr=0.01))  # type: ignore[misc, call-arg]
        replicas.lead(lambda model, optimizer: BypassSchedule(model, optimizer, opt1=1, opt2=2))
        with (
            monkeypatch.context() as patched
        ):  # until the next is made: a subclass's step would be wrapped as it is now
            patched.setattr(kind, "step", lambda *_: pytest.fail("stepped one by one"))
            while replicas.walking:
                replicas.step(replicas.backward(loss_fn, batches_at(0)))
        assert {schedule.phase for schedule in replicas.schedules if schedule} == {"done"}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda models: models[1].append(nn.Linear(2, 2)), "differ in their parameters"),
        (lambda models: models[1].float(), "bring all replicas to one dtype"),
        (
            lambda models: models.__setitem__(2, nn.Sequential(nn.Linear(6, 9), *models[2][1:])),
            "0.weight has the shape",
        ),
        (lambda models: bypass_fx.extend(models[3]), "a model is extended"),
    ],
)
def test_what_does_not_fit_together_is_refused(spoil: Callable[[Any], Any], said: str) -> None:
    models = seeds()
    spoil(models)
    with pytest.raises(BypassError, match=said):
        Replicas(models, [sgd(model.parameters()) for model in models])


def test_misuse_is_refused() -> None:
    models = seeds()
    with pytest.raises(BypassError, match="as many optimizers"):
        Replicas(models, [sgd(models[0].parameters())])
    for at_once in (0, -1):  # no replica would go through the model
        with pytest.raises(BypassError, match=f"at_once is {at_once}; give a number of replicas, 1 or more"):
            together(models, sgd, at_once)
    replicas = together(models, sgd)
    with pytest.raises(BypassError, match="0-dim"):
        replicas.backward(lambda model, batch: model(batch[0]), batches_at(0))
    shared = bypass_fx.NotWorse(lambda model: 0.0)
    with pytest.raises(BypassError, match="share one"):
        together(models, sgd).lead(lambda m, o: BypassSchedule(m, o, opt1=1, opt2=2, accept=shared))
    replicas.lead(lambda model, optimizer: BypassSchedule(model, optimizer, opt1=1, opt2=2))
    with pytest.raises(BypassError, match="under way"):
        copy.deepcopy(replicas)
