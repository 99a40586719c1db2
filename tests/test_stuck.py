"""Promises of the look for stuck channels: it finds those, and leaves nothing behind."""

from __future__ import annotations

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
from bypass_fx.schedule import BypassSchedule
from bypass_fx.stuck import StuckReport, stuck
from tests.dead_units import adam, batches_for, loss_fn, net
from tests.runs import kill
from tests.test_param_group import same
from tests.test_probe import everything, noisy, trained

pytestmark = pytest.mark.usefixtures("small_heap")


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


class Optional(nn.Module):
    """σ is called only where the optional argument is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.fc1(x)
        if scale is not None:
            h = scale * F.relu(h)
        out: Tensor = self.fc2(h)
        return out


def test_sites_of_other_inputs_are_looked_at() -> None:
    model, ((x, y), *_) = Optional(), batches_for(6)
    kill(model.fc1, 4)
    given = (x, torch.ones(()))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(*given), batch)

    (flow,) = stuck(model, loss, [y], mode="all", example_inputs=given).sites
    assert 4 in flow.stuck and len(flow.stuck) < 8
    assert not surgery.is_extended(model)
    optimizer = adam(model)
    schedule = BypassSchedule(model, optimizer, 1, 1, cycles=2, mode="all", example_inputs=given)
    while schedule.phase != "done":
        optimizer.zero_grad()
        loss(model, y).backward()
        optimizer.step()
        schedule.step()
    assert len(schedule.reports) == 2


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
    for threshold in (0.0, float("nan"), None):
        with pytest.raises(BypassError, match=f"threshold is {threshold!r}; give a share above 0"):
            stuck(model, loss_fn, batches_for(6), threshold=threshold)  # type: ignore[arg-type]
    with pytest.raises(BypassError, match="loss_fn is None; give a function"):
        stuck(model, None, batches_for(6))  # type: ignore[arg-type]
    with pytest.raises(BypassError, match="plan is a str; give what"):
        stuck(model, loss_fn, batches_for(6), plan="1")  # type: ignore[arg-type]
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
