"""Promises of the look for stuck channels: it finds those, leaves nothing behind, and D moves in them only."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bypass_fx
from bypass_fx import surgery
from bypass_fx.passes.errors import BypassError, PlanError
from bypass_fx.passes.plan import Plan
from bypass_fx.replicas import Replicas
from bypass_fx.schedule import BypassSchedule
from bypass_fx.stuck import StuckReport, stuck
from bypass_fx.trainer import Trainer
from tests.bypasses import train_step
from tests.runs import digits, kill, mlp, short
from tests.test_param_group import same
from tests.test_probe import everything, noisy, trained

pytestmark = pytest.mark.usefixtures("small_heap")


def batches_for(*shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(16, *shape, generator=generator), torch.randn(16, 2, generator=generator)) for _ in range(2)]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def net() -> nn.Sequential:
    """A net with units 2 and 5 of the first layer dead, and 0 of the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    kill(model[0], 2, 5)
    kill(model[2], 0)
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-2)


class Functional(nn.Module):
    """σ as a function, in place, and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x), inplace=True)) + self.fc2(F.relu(self.fc1(-x)))


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.block = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, self.fc1(x), use_reentrant=False)
        return out


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 2)]
    return nn.Sequential(*layers)


def squashed(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("make", "layer", "shape"),
    [
        (Functional, "fc1", (6,)),
        (Recomputed, "block.0", (6,)),
        (convolutions, "0", (3, 6, 6)),
        *((lambda a=activation: squashed(a), "0", (6,)) for activation in (nn.Tanh(), nn.GELU(), nn.Sigmoid(), nn.SiLU())),
    ],
)  # fmt: skip
def test_dead_and_saturated_channels_are_found(
    make: Callable[[], nn.Module], layer: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    model = make()
    assert not stuck(model, loss_fn, batches_for(*shape), mode="all").stuck
    kill(model.get_submodule(layer), 3, 6)
    report = stuck(model, loss_fn, batches_for(*shape), mode="all")
    assert {site.stuck for site in report.sites} == {(3, 6)}
    assert all(site.moving == (3, 6) for site in report.plan) and len(report.plan) == len(report.sites)
    assert report.stuck == 2 * len(report.sites) and report.channels == 8 * len(report.sites)


def test_shares_are_the_derivative_weighted_by_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    (x, y), *_ = batches_for(6)
    (flow,) = stuck(model, loss_fn, [(x, y)]).sites
    z = model[0](x).detach().requires_grad_()
    a = torch.tanh(z)
    (g,) = torch.autograd.grad(F.mse_loss(model[2](a), y), a)
    wanted = ((1 - a.square()) * g).norm(dim=0) / g.norm(dim=0)
    torch.testing.assert_close(torch.tensor(flow.shares), wanted.detach(), rtol=1e-5, atol=1e-6)


def test_batches_and_calls_add_up_and_a_rare_unit_is_not_stuck() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.copy_(torch.tensor([-5.0, -50.0]))
    rare = [(torch.zeros(16, 1), torch.ones(16, 2)), (torch.tensor([[10.0]] + 15 * [[0.0]]), torch.ones(16, 2))]
    assert stuck(model, loss_fn, rare[:1]).sites[0].stuck == (0, 1)
    assert stuck(model, loss_fn, rare).sites[0].stuck == (1,)


def test_where_no_gradient_arrives_nothing_is_said() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[:, 1] = 0  # what unit 1 makes is not read
    first, second = stuck(model, loss_fn, batches_for(6)).sites
    assert second.shares[1] != second.shares[1] and second.stuck == (0,) and first.stuck == (2, 5)


def test_frozen_layers_are_not_stuck() -> None:
    model = net()
    model[0].requires_grad_(False)
    first, second = stuck(model, loss_fn, batches_for(6)).sites
    assert first.stuck == () and second.stuck == (0,)
    model[2].requires_grad_(False)  # only what is behind the second moves
    assert not stuck(model, loss_fn, batches_for(6)).stuck


def test_nothing_of_the_look_is_left() -> None:
    model = noisy()
    kill(model[1], 4)
    optimizer, driver = trained(model)
    before = everything(model, optimizer, driver)
    gradients = [p.grad for p in model.parameters()]
    report = stuck(model, loss_fn, batches_for(6), mode="all")
    assert report.stuck == 1
    assert same(everything(model, optimizer, driver), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_nothing_of_a_look_that_fails_is_left() -> None:
    def failing(model: nn.Module, batch: Any) -> Tensor:
        model(batch[0])
        raise KeyError("the user's own")

    model = noisy()
    optimizer, driver = trained(model)
    before = everything(model, optimizer, driver)
    with pytest.raises(KeyError, match="the user's own"):
        stuck(model, failing, batches_for(6))
    assert same(everything(model, optimizer, driver), before) and not surgery.is_extended(model)


class Counting(nn.Module):
    """Buffers that a forward replaces, one by a longer one, or makes; and one that is a view of a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("means", torch.zeros(0))
        self.register_buffer("scale", torch.ones(1).expand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        self.means = torch.cat([self.means, x.mean().reshape(1)])
        if not hasattr(self, "first"):
            self.register_buffer("first", x.detach().clone())
        return x * self.scale


def test_buffers_of_every_kind_stay() -> None:
    model = nn.Sequential(Counting(), *net())
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    assert stuck(model, loss_fn, batches_for(6)).stuck == 3
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    for name, (buffer, value) in before.items():
        assert after[name] is buffer and torch.equal(buffer, value)


def test_biases_of_every_kind_stay() -> None:
    model = net()
    with torch.no_grad():
        model[2].bias.fill_(-0.0)
        model[0].bias[1] = -torch.inf
    before = [parameter.detach().clone().view(torch.int32) for parameter in model.parameters()]
    stuck(model, loss_fn, batches_for(6))
    assert same([parameter.detach().view(torch.int32) for parameter in model.parameters()], before)


def test_two_threads_look_at_once() -> None:
    both, found = threading.Barrier(2, timeout=30), list[int]()

    def meeting(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        both.wait()
        loss = loss_fn(model, batch)
        both.wait()
        return loss

    models = [net(), net()]
    threads = [
        threading.Thread(target=lambda model=model: found.append(stuck(model, meeting, batches_for(6)).stuck))
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3, 3]


def test_attention_and_compiled_models() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    kill(layer.linear1, 7)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch).square().sum()
        return out

    batches = [torch.randn(4, 5, 8)]
    report = stuck(layer, loss, batches)
    assert {site.name: site.moving for site in report.plan} == {"_ff_block.relu": (7,)}
    assert all(share > 0 for site in report.sites if "attn" in site.name for share in site.shares)
    assert stuck(torch.compile(layer, backend="aot_eager"), loss, batches) == report


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 1e-4, momentum=0.9, nesterov=True),
    "fused": lambda parameters: torch.optim.Adam(parameters, 1e-2, fused=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("comeback", ["lagrangian", "homotopy", "proximal", "variety"])
@pytest.mark.filterwarnings("ignore:penalty")
def test_d_moves_in_the_stuck_channels_only(make: Callable[[Any], torch.optim.Optimizer], comeback: str) -> None:
    model, batches = net(), batches_for(6)
    optimizer = make(model.parameters())
    arguments: dict[str, Any] = {"gamma": bypass_fx.Linear(0.1)} if comeback == "proximal" else {}
    schedule = BypassSchedule(
        model, optimizer, 4, 6, comeback=comeback, select="stuck", loss_fn=loss_fn, batches=batches, **arguments
    )
    moved = {site.name: set[int]() for site in schedule.plan}
    while schedule.phase != "done":
        train_step(model, optimizer, schedule)
        for site in surgery.sites(model) if schedule.phase != "done" else []:
            moved[site.name] |= set(surgery.delta_of(model, site).nonzero().flatten().tolist())
    assert moved == {"1": {2, 5}, "3": {0}}
    assert not surgery.is_extended(model)
    model[0].bias.grad = None
    train_step(model, optimizer, schedule)  # nothing of it is left in the optimiser
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_lbfgs_too() -> None:
    model, batches = net(), batches_for(6)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    schedule = BypassSchedule(model, optimizer, 3, 3, select="stuck", loss_fn=loss_fn, batches=batches)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batches[0]) + schedule.penalty()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)  # type: ignore[arg-type]
        found = [surgery.delta_of(model, site).nonzero().flatten().tolist() for site in surgery.sites(model)]
        assert found == [[2, 5], [0]]
        schedule.step()


def test_a_step_of_lbfgs_ends_where_it_was_evaluated() -> None:
    model, batches = net(), batches_for(6)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4, line_search_fn="strong_wolfe")
    schedule = BypassSchedule(model, optimizer, 3, 3, select="stuck", loss_fn=loss_fn, batches=batches)
    evaluated: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batches[0]) + schedule.penalty()
        loss.backward()
        evaluated.append(loss.item())
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert any(abs(loss_fn(model, batches[0]).item() - loss) < 1e-6 for loss in evaluated)


def test_gradients_of_what_is_held_count_in_no_norm() -> None:
    model = net()
    schedule = BypassSchedule(model, adam(model), 3, 3, select="stuck", loss_fn=loss_fn, batches=batches_for(6))
    loss_fn(model, batches_for(6)[0]).backward()
    for site in schedule.plan:
        gradient = surgery.delta_of(model, site).grad
        assert gradient is not None and tuple(gradient.nonzero().flatten().tolist()) == site.moving


def test_dead_units_come_to_life() -> None:
    torch.manual_seed(0)
    x = torch.rand(256, 2) * 2 - 1
    y = torch.stack([(4 * x).sin().prod(1), (3 * x).cos().sum(1)], 1)
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(model[0], 0, 1, 2)
    with torch.no_grad():
        model[0].bias.clamp_(min=-2.0)  # dead on the square, and not far away
    plain, losses = copy.deepcopy(model), {}
    for name, one in (("plain", plain), ("bypassed", model)):
        optimizer = adam(one)
        schedule = None
        if name == "bypassed":
            schedule = BypassSchedule(
                one, optimizer, 100, 200, comeback="lagrangian", delta_lr=5e-2,
                select="stuck", loss_fn=loss_fn, batches=[(x, y)],
            )  # fmt: skip
        for _ in range(500):
            optimizer.zero_grad()
            loss = loss_fn(one, (x, y))
            (loss + schedule.penalty() if schedule else loss).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        losses[name] = loss.item()
    left = {name: stuck(one, loss_fn, [(x, y)]).stuck for name, one in (("plain", plain), ("bypassed", model))}
    assert left["plain"] == 3 > left["bypassed"]
    assert losses["bypassed"] < 0.9 * losses["plain"], losses


def test_each_cycle_looks_anew_and_none_begins_where_nothing_is_stuck() -> None:
    model, batches = net(), batches_for(6)
    optimizer = adam(model)
    arguments: dict[str, Any] = {"select": "stuck", "loss_fn": loss_fn, "batches": iter(batches)}
    schedule = BypassSchedule(model, optimizer, 2, 2, cycles=3, rest=1, **arguments)
    assert [site.moving for site in schedule.plan] == [(2, 5), (0,)]
    for _ in range(4):
        train_step(model, optimizer, schedule)
    with torch.no_grad():
        model[0].bias.fill_(0.0)  # alive again, but for the last
    kill(model[0], 7)
    kill(model[2], 0)
    train_step(model, optimizer, schedule)
    assert schedule.phase == "opt1" and [site.moving for site in schedule.plan] == [(7,), (0,)]
    for _ in range(4):
        train_step(model, optimizer, schedule)
    with torch.no_grad():
        model[0].bias.fill_(0.0)
        model[2].bias.fill_(0.0)
    train_step(model, optimizer, schedule)
    assert schedule.phase == "done" and len(schedule.reports) == 2


def test_a_state_goes_on_with_its_plan() -> None:
    def begun(**arguments: Any) -> tuple[nn.Module, torch.optim.Optimizer, BypassSchedule]:
        model = net()
        optimizer = adam(model)
        return model, optimizer, BypassSchedule(model, optimizer, 4, 6, comeback="lagrangian", **arguments)

    measured = {"select": "stuck", "loss_fn": loss_fn, "batches": batches_for(6)}
    whole, before = begun(**measured), begun(**measured)
    for _ in range(12):
        train_step(*whole)
    for _ in range(6):
        train_step(*before)
    state = copy.deepcopy([part.state_dict() for part in reversed(before)])
    after = begun(plan=Plan.from_json(state[0]["plan"]))
    for part, own in zip(reversed(after), state, strict=True):
        part.load_state_dict(own)
    for _ in range(6):
        train_step(*after)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), after[0].parameters(), strict=True))
    with pytest.raises(BypassError, match=r"another plan for these sites; build the schedule with plan="):
        begun()[2].load_state_dict(state[0])


def test_a_state_goes_on_and_later_cycles_look_anew() -> None:
    batches = batches_for(6)

    def begun(plan: Plan | None = None) -> tuple[nn.Module, torch.optim.Optimizer, BypassSchedule]:
        model = net()
        optimizer = adam(model)
        measured: dict[str, Any] = {"select": "stuck", "loss_fn": loss_fn, "batches": batches}
        return model, optimizer, BypassSchedule(model, optimizer, 2, 2, cycles=2, plan=plan, **measured)

    before = begun()
    train_step(*before)
    state = copy.deepcopy([part.state_dict() for part in reversed(before)])
    after = begun(Plan.from_json(state[0]["plan"]))
    for part, own in zip(reversed(after), state, strict=True):
        part.load_state_dict(own)
    for model, optimizer, schedule in (before, after):
        train_step(model, optimizer, schedule)
        train_step(model, optimizer, schedule)
        kill(model[0], 7)  # type: ignore[index]
        train_step(model, optimizer, schedule)
        assert schedule.phase == "opt1" and next(site.moving for site in schedule.plan) == (2, 5, 7)


def test_replicas_do_what_each_would_alone() -> None:
    batch = torch.stack([batches_for(6)[i % 2][0] for i in range(3)]), torch.stack([batches_for(6)[0][1]] * 3)

    def models() -> list[nn.Sequential]:
        made = [net() for _ in range(3)]
        kill(made[1][0], 1)
        with torch.no_grad():
            made[2][0].bias.zero_()
            made[2][2].bias.zero_()
        return [model.double() for model in made]

    def lead(model: nn.Module, optimizer: torch.optim.Optimizer, row: int) -> BypassSchedule | None:
        one = [(batch[0][row].double(), batch[1][row].double())]
        try:
            return BypassSchedule(model, optimizer, 3, 4, delta_lr=0.1, select="stuck", loss_fn=loss_fn, batches=one)
        except PlanError:
            return None

    together, alone = models(), models()
    replicas = Replicas(together, [adam(model) for model in together])
    rows = iter(range(3))
    replicas.lead(lambda model, optimizer: lead(model, optimizer, next(rows)))
    assert [schedule and [site.moving for site in schedule.plan] for schedule in replicas.schedules] == [
        [(2, 5), (0,)], [(1, 2, 5), (0,)], None
    ]  # fmt: skip
    both = tuple(each.double() for each in batch)
    for _ in range(9):
        replicas.step(replicas.backward(loss_fn, both))
    for row, model in enumerate(alone):
        optimizer = adam(model)
        schedule = lead(model, optimizer, row)
        for _ in range(9):
            optimizer.zero_grad()
            loss = loss_fn(model, (both[0][row], both[1][row]))
            (loss + schedule.penalty() if schedule else loss).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        for mine, other in zip(together[row].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, other)


def test_equal_owners_share_their_code_whichever_channels_move() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(F.relu(self.fc1(x)))

    torch.manual_seed(1)
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 2))
    for index, block in enumerate([*model][:2]):
        kill(block.fc1, index)
    plan = bypass_fx.plan(model, select="stuck", loss_fn=loss_fn, batches=batches_for(6))
    assert [site.moving for site in plan] == [(0,), (1,)]
    assert Plan.from_json(plan.to_json()) == plan
    bypass_fx.extend(model, plan)
    assert type(model[0]) is type(model[1])


def test_what_is_wrong_is_named() -> None:
    model = net()
    for select in ("stuck", "probe"):
        with pytest.raises(PlanError, match=rf"select='{select}' .*pass loss_fn=.*and batches="):
            bypass_fx.plan(model, select=select, loss_fn=loss_fn)
    with pytest.raises(BypassError, match="batches is empty"):
        stuck(model, loss_fn, [])
    with pytest.raises(BypassError, match="one number, a 0-dim tensor"):
        stuck(model, lambda model, batch: model(batch[0]), batches_for(6))
    for lost in (lambda model, batch: loss_fn(model, batch).detach(), torch.no_grad()(loss_fn)):
        with pytest.raises(BypassError, match="the loss has no gradient: let loss_fn"):
            stuck(model, lost, batches_for(6))
    with pytest.raises(BypassError, match=r"meta device.*load its weights first"):
        stuck(net().to("meta"), loss_fn, [(x.to("meta"), y.to("meta")) for x, y in batches_for(6)])
    with pytest.raises(PlanError, match="nothing to bypass"):
        stuck(nn.Sequential(nn.Linear(6, 2)), loss_fn, batches_for(6))
    optimizer, plan = adam(model), bypass_fx.plan(model)
    for channel in (8, -1):
        strange = Plan((replace(plan.sites[0], moving=(channel,)),))
        with pytest.raises(PlanError, match=f"1: moving names channel {channel}; give numbers from 0 to 7"):
            BypassSchedule(model, optimizer, 2, 2, plan=strange)
        assert not surgery.is_extended(model) and len(optimizer.param_groups) == 1
    alive = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = adam(alive)
    with pytest.raises(PlanError, match="none of the 8 channels is stuck"):
        BypassSchedule(alive, optimizer, 2, 2, select="stuck", loss_fn=loss_fn, batches=batches_for(6))
    assert not surgery.is_extended(alive) and len(optimizer.param_groups) == 1
    assert isinstance(stuck(alive, loss_fn, batches_for(6)), StuckReport)


def test_the_trainer_bypasses_where_something_is_stuck_and_trains_on_where_nothing_is() -> None:
    data = digits()
    model = mlp(data)
    assert isinstance(model, nn.Sequential)
    settings = short(select="stuck", cycles=2)
    history = Trainer(model, data, settings).fit()
    titles = [moment.name for moment in history.moments if moment.name != "evaluation"]
    assert titles == ["θ*", "nothing stuck", "end"] and not history.reports
    assert history.moment("end").bypass == history.moment("end").baseline  # to the end, step by step the same
    model = mlp(data)
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    kill(first, 0)
    history = Trainer(model, data, short(select="stuck")).fit()
    (report,) = history.reports
    assert [arrival.site for arrival in report.arrivals] == [history.plan.sites[0].name]
