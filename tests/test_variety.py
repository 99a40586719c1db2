"""Promises of the return to the strict variety with D ≠ 0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bypass_fx
from bypass_fx import surgery
from bypass_fx.comeback import Variety
from bypass_fx.comeback.variety import Side, cut, hindrance
from bypass_fx.schedule import BypassSchedule
from tests.attentions import Attention, Separate
from tests.bypasses import X, Y, train_step, until_done
from tests.test_constraint import extended

PATTERNS = {
    "dense, more channels than inputs": (lambda: [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 9)], "A"),
    "dense, more channels than outputs": (lambda: [nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)], "W"),
    "augmented, A moves": (lambda: [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 9, bias=False)], "A"),
    "augmented, W moves": (lambda: [nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)], "W"),
    "convolution, A moves": (lambda: [nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 2)], "A"),
    "convolution, W moves": (lambda: [nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 2)], "W"),
    "zero padding": (lambda: [nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1)], "A"),
    "W in groups": (lambda: [nn.Conv1d(2, 12, 2, groups=2), nn.ReLU(), nn.Conv1d(12, 9, 3)], "A"),
    "A in groups": (lambda: [nn.Conv1d(4, 12, 2), nn.ReLU(), nn.Conv1d(12, 3, 1, groups=3)], "W"),
    "both in groups": (lambda: [nn.Conv1d(2, 12, 2, groups=2), nn.ReLU(), nn.Conv1d(12, 8, 3, groups=2)], "A"),
    "BatchNorm in W": (lambda: [nn.Conv1d(2, 8, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3)], "A"),
    "transposed": (lambda: [nn.ConvTranspose1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3)], "A"),
}  # fmt: skip


@pytest.mark.parametrize(("layers", "side"), PATTERNS.values(), ids=PATTERNS)
def test_a_cut_scales_adw_by_what_it_leaves_and_to_nothing_in_the_end(layers, side: Side) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = extended(nn.Sequential(*layers())).eval()
    (site,) = bypass_fx.sites(model)
    assert hindrance(model, site, side) == ""
    delta, before = surgery.delta_of(model, site).clone(), bypass_fx.norms(model)[site.name].item()
    cut(model, site, side, torch.tensor(0.25))
    assert bypass_fx.norms(model)[site.name].item() == pytest.approx(0.75 * before, rel=1e-9)
    cut(model, site, side, torch.tensor(1.0))
    assert bypass_fx.norms(model)[site.name].item() < 1e-12 * before
    assert torch.equal(surgery.delta_of(model, site), delta)


@pytest.mark.parametrize(("layers", "side"), PATTERNS.values(), ids=PATTERNS)
def test_from_the_variety_the_projection_changes_no_output(layers, side: Side) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = extended(nn.Sequential(*layers())).eval()
    (site,) = bypass_fx.sites(model)
    cut(model, site, side, torch.tensor(1.0))
    first = model[0]
    x = torch.randn(4, 9 if isinstance(first, nn.Linear) and first.in_features == 9 else 3, dtype=torch.float64)
    if not isinstance(first, nn.Linear):
        x = torch.randn(4, first.in_channels, 12, dtype=torch.float64)  # type: ignore[arg-type,union-attr]
    assert (surgery.delta_of(model, site).abs() > 1e-3).any()
    before = model(x)
    bypass_fx.contract(model)
    assert torch.allclose(model(x), before, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("inputs", "outputs", "bias", "side"), [(3, 8, True, "A"), (8, 3, True, "W"), (8, 3, False, "W")]
)
def test_the_values_of_attention_are_led_to_the_variety_too(inputs: int, outputs: int, bias: bool, side: Side) -> None:
    torch.manual_seed(0)
    model = Attention()
    model.qkv, model.proj = nn.Linear(inputs, 24), nn.Linear(8, outputs, bias)
    model.double()
    others = model.qkv.weight[:16].clone(), model.qkv.bias[:16].clone()
    bypass_fx.extend(model)
    (site,) = bypass_fx.sites(model)
    surgery.delta_of(model, site).data.normal_()
    assert hindrance(model, site, side) == ""
    cut(model, site, side, torch.tensor(1.0))
    assert float(bypass_fx.norms(model)[site.name]) < 1e-12
    assert torch.equal(model.qkv.weight[:16], others[0]) and torch.equal(model.qkv.bias[:16], others[1])
    x = torch.randn(2, 5, inputs, dtype=torch.float64)
    before = model(x)
    bypass_fx.contract(model)
    assert torch.allclose(model(x), before, rtol=1e-9, atol=1e-11)


def test_shared_heads_of_values_can_not_be_moved_apart() -> None:
    model = Separate()
    model.out = nn.Linear(8, 3)
    bypass_fx.extend(model)
    (site,) = bypass_fx.sites(model)
    assert "serve several channels" in hindrance(model, site, "W")


@given(st.integers(1, 6), st.integers(2, 7), st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=60)
def test_a_cut_of_a_is_the_nearest_a_that_meets_the_constraint(m: int, n: int, l: int, seed: int) -> None:  # noqa: E741
    """A' = A (I − (DW)(DW)⁺) where n > l; elsewhere there is no way but D = 0, and it says so."""
    torch.manual_seed(seed)
    model = extended(nn.Sequential(nn.Linear(l, n), nn.ReLU(), nn.Linear(n, m)), seed)
    (site,) = bypass_fx.sites(model)
    a, w, d = model[2].weight.detach().clone(), model[0].weight.detach(), surgery.delta_of(model, site).detach()  # type: ignore[index]
    if n <= l:
        assert hindrance(model, site, "A") == f"{n} channels, no more than the {l} inputs of W"
        return
    dw = torch.diag(d) @ w
    cut(model, site, "A", torch.tensor(1.0))
    assert torch.allclose(model[2].weight, a - a @ dw @ torch.linalg.pinv(dw), atol=1e-9)  # type: ignore[index]


def test_a_channel_without_d_keeps_its_weights() -> None:
    model = extended(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4)))
    (site,) = bypass_fx.sites(model)
    with torch.no_grad():
        surgery.delta_of(model, site)[2:] = 0
    before = model[2].weight.clone()  # type: ignore[index]
    cut(model, site, "A", torch.tensor(1.0))
    assert torch.equal(model[2].weight[:, 2:], before[:, 2:])  # type: ignore[index]
    assert torch.allclose(model[2].weight[:, :2], torch.zeros(4, 2).double(), atol=1e-12)  # type: ignore[index]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Linear(2, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.again.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.ones(6, dtype=x.dtype)) + self.second(torch.relu(self.first(x)))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 7))
    model[2].weight.requires_grad_(False)
    return model


def parametrised() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 7)))


HINDERED = {
    "narrow": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5)),
        "4 channels, no more than the 6 inputs",
    ),
    "tied": (Tied, "second.weight is tied to another parameter"),
    "frozen": (frozen, "2.weight is frozen"),
    "parametrised": (parametrised, "2.weight is computed from other parameters"),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(6, 12, 1, groups=2), nn.ReLU(), nn.Conv1d(12, 3, 1, groups=3)),
        "the groups of W and A cut through each other",
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv1d(4, 4, 1)),
        "1 channels, no more than the 3 inputs of W",
    ),
}


@pytest.mark.parametrize(("make", "reason"), HINDERED.values(), ids=HINDERED)
def test_where_a_cannot_move_the_hindrance_is_named(make, reason: str) -> None:  # type: ignore[no-untyped-def]
    model = extended(make())
    assert reason in hindrance(model, bypass_fx.sites(model)[0], "A")


def bypass(model: nn.Module, optimizer: torch.optim.Optimizer, opt2: int = 150) -> tuple[BypassSchedule, float]:
    """One bypass; the schedule, and by how much the last step of it changed the loss."""
    schedule = BypassSchedule(model, optimizer, 60, opt2, comeback="variety", epsilon=1e-12, mode="strict")
    x, y = X.double(), Y.double()
    jump = 0.0
    while schedule.phase != "done":
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            before = nn.functional.mse_loss(model(x), y).item()
            schedule.step()
            jump = abs(nn.functional.mse_loss(model(x), y).item() - before) / before
    return schedule, jump


@pytest.mark.parametrize("width", [8, 16])
def test_it_arrives_on_time_at_adw_zero_with_d_unequal_zero_and_without_a_jump(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
    ).double()  # fmt: skip
    schedule, jump = bypass(model, torch.optim.Adam(model.parameters(), 1e-2), opt2=300)
    assert schedule.report is not None and schedule.report.left_out == () and schedule.report.notes == ()
    assert schedule.report.opt2_steps == 300
    assert all(arrival.norm < 1e-12 < 0.1 < arrival.delta for arrival in schedule.report.arrivals)
    assert jump < 1e-4  # 8e-2 where the optimiser moves W at its full rate to the end; it falls with T


class OneW(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 2), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w(x)
        return self.a(torch.relu(y)) + self.b(torch.tanh(y))  # type: ignore[no-any-return]


class OneA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.w, self.a = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.relu(self.v(x))) + self.a(torch.tanh(self.w(x)))  # type: ignore[no-any-return]


def test_a_weight_of_two_sites_is_moved_for_neither() -> None:
    """What one site's cut leaves in the variety, the next one's would take out of it again."""
    torch.manual_seed(0)
    model = OneW().double()
    schedule, _ = bypass(model, torch.optim.Adam(model.parameters(), 1e-2), opt2=40)
    assert schedule.report is not None
    assert [arrival.norm < 1e-12 for arrival in schedule.report.arrivals] == [True, True]
    assert all(arrival.delta > 0.01 for arrival in schedule.report.arrivals)  # the other side moves


def test_that_several_sites_share_a_side_is_named_where_no_other_can_move() -> None:
    """A has as many outputs as channels, so that W cannot move."""
    model = OneA()
    bypass_fx.extend(model, mode="strict")
    comeback = Variety()
    comeback.begin(model)
    assert all("its A is that of 2 sites" in note for note in comeback.notes()) and len(comeback.notes()) == 2


def test_sites_with_no_such_way_go_to_d_zero_on_time_and_the_report_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    schedule, _ = bypass(model, torch.optim.Adam(model.parameters(), 1e-2))
    assert schedule.report is not None
    assert schedule.report.notes == (
        "variety: site '1' went to D = 0: 4 channels, no more than the 6 inputs of W; "
        "4 channels, no more than the 8 outputs of A",
    )
    there = {arrival.site: arrival for arrival in schedule.report.arrivals}
    assert there["1"].delta == 0 < there["3"].delta
    assert max(arrival.norm for arrival in there.values()) < 1e-12


def test_the_side_that_must_change_less_is_taken_and_kept() -> None:
    model = extended(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 1)))
    come = Variety()
    come.begin(model)
    assert come.state_dict()["sides"] == {"1": "W"}  # one direction of twenty, against six
    assert {id(parameter) for parameter in come.moves(model)} == {id(model[i].weight) for i in (0, 2)}  # type: ignore[index]


@torch.no_grad()
def test_a_d_and_w_slow_down_along_the_path_and_only_those() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = BypassSchedule(model, optimizer, 0, 10, comeback=Variety("linear"), epsilon=1e-30)
    moved = []
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer.step()
        moved.append([float((b - p).mean()) for b, p in zip(before, model.parameters(), strict=True)])
        schedule.step()
    d, w, b, a, b_a = zip(*moved, strict=True)
    for slowed in (d, w, a):
        assert slowed == pytest.approx([0.1, 0.09, 0.08])
    for whole in (b, b_a):
        assert whole == pytest.approx([0.1] * 3)


def test_a_weight_that_is_frozen_on_the_way_stays_and_d_goes_to_zero_instead() -> None:
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = BypassSchedule(model, optimizer, 3, 10, comeback="variety", epsilon=1e-12)
    for _ in range(7):
        train_step(model, optimizer, schedule)
    model.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    kept = [model[0].weight.clone(), model[2].weight.clone()]
    until_done(model, optimizer, schedule)
    assert schedule.report is not None
    assert [(arrival.norm, arrival.delta) for arrival in schedule.report.arrivals] == [(0.0, 0.0)]
    assert schedule.report.notes == ("variety: site '1' went to D = 0: 0.weight is frozen",)
    assert torch.equal(model[0].weight, kept[0]) and torch.equal(model[2].weight, kept[1])
