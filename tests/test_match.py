"""Which sites are found, of which kind, and why others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.plan import Mode, Site
from tests.architectures import FUNCTIONAL, IN_PLACE, MODULES
from tests.invariants.test_generated import on_the_variety


def only(model: nn.Module, mode: Mode = "strict") -> Site:
    (site,) = bypass_fx.plan(model, mode=mode).sites
    return site


def reasons(model: nn.Module, mode: Mode = "strict") -> str:
    plan = bypass_fx.plan(model, mode=mode)
    assert not plan.sites
    return "; ".join(refusal.reason for refusal in plan.refusals)


class Functional(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.function(self.fc1(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_activation_module_is_a_site(name: str) -> None:
    site = only(nn.Sequential(nn.Linear(3, 5), MODULES[name](), nn.Linear(5, 2)))
    assert (site.name, site.activation, site.width, site.channel_dim) == ("1", name, 5, -1)


@pytest.mark.parametrize("name", sorted(FUNCTIONAL))
def test_every_activation_function_is_a_site(name: str) -> None:
    site = only(Functional(FUNCTIONAL[name]))
    assert (site.activation, site.kind, site.constraint) == (name, "strict", "folded")
    assert str(site.first) == "fc1" and str(site.second) == "fc2"


@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_an_in_place_activation_keeps_its_flag_while_extended_and_after(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 5), IN_PLACE[name](inplace=True), nn.Linear(5, 2))
    x = torch.randn(4, 3)
    before = net(x)
    bypass_fx.extend(net)
    assert torch.equal(net(x), before)
    bypass_fx.contract(net)
    assert net[1].inplace


def test_custom_element_wise_modules_are_activations() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    site = only(nn.Sequential(nn.Linear(3, 5), Swish(), nn.Linear(5, 2)))
    assert site.activation == "Swish" and site.name == "1"


def test_linear_as_a_function_is_an_affine_map() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(2, 5))
            self.b1, self.b2 = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(x, self.w1, self.b1)), self.w2, self.b2)

    site = only(Net())
    assert site.constraint == "folded" and site.second is not None and site.second.bias == "b2"


def test_one_module_called_twice_is_two_sites_with_their_own_delta() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))  # type: ignore[no-any-return]

    net = Net()
    assert [(site.name, site.width) for site in bypass_fx.plan(net)] == [("act", 4), ("act_1", 5)]
    bypass_fx.extend(net)
    assert net.get_parameter("delta_act").shape == (4,) and net.get_parameter("delta_act_1").shape == (5,)


@pytest.mark.parametrize(
    ("second", "constraint"),
    [
        (nn.Conv2d(6, 2, 3), "folded"),
        (nn.Conv2d(6, 2, 3, padding=1), "augmented"),
        (nn.Conv2d(6, 2, 3, padding="same"), "augmented"),
        (nn.Conv2d(6, 2, 1, padding="same"), "folded"),
        (nn.Conv2d(6, 2, 3, padding=1, padding_mode="circular"), "folded"),
        (nn.Conv2d(6, 2, 3, bias=False), "augmented"),
        (nn.Conv2d(6, 2, 3, groups=2), "folded"),
        (nn.ConvTranspose2d(6, 2, 3), "augmented"),
    ],
)
def test_convolutions_fold_where_the_bias_can_carry_the_constant(second: nn.Module, constraint: str) -> None:
    assert only(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), second)).constraint == constraint


def test_without_a_bias_in_w_there_is_nothing_to_fold_or_augment() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1, bias=False))
    assert only(net).constraint == "folded"


def test_a_batchnorm_belongs_to_w_and_makes_the_fold_exact_in_eval_mode_only() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    site = only(net)
    assert site.exact == "eval" and site.first is not None and site.first.norm == "1"
    assert "eval mode only" in bypass_fx.plan(net, mode="auto").refusals[0].reason or not bypass_fx.plan(net).sites


@pytest.mark.parametrize(
    ("between", "second", "exact"),
    [
        ([nn.Dropout(0.0)], nn.Conv2d(6, 2, 3), "always"),
        ([nn.Dropout(0.5)], nn.Conv2d(6, 2, 3), "eval"),
        ([nn.Identity(), nn.AvgPool2d(2)], nn.Conv2d(6, 2, 3), "always"),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], nn.Linear(6, 2), "always"),
        ([nn.Flatten()], nn.Linear(6 * 16, 2), "always"),
    ],
)
def test_linear_maps_that_treat_channels_alike_may_stand_between(
    between: list[nn.Module], second: nn.Module, exact: str
) -> None:
    site = only(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *between, second))
    assert (site.constraint, site.exact, site.width) == ("folded", exact, 6)


@pytest.mark.parametrize("dropped_first", [True, False])
def test_a_dropout_before_one_of_several_calls_of_a_counts(dropped_first: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.drop, self.same = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.w(x).relu()
            one, two = (self.drop, self.same) if dropped_first else (self.same, self.drop)
            return self.a(one(y)) + self.a(two(y))  # type: ignore[no-any-return]

    (site,) = bypass_fx.plan(Net(), mode="strict")
    assert (site.constraint, site.exact) == ("augmented", "eval")


def test_average_pooling_that_pads_needs_the_augmented_form() -> None:
    assert (
        only(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(6, 2, 1))).constraint
        == "augmented"
    )


@pytest.mark.parametrize("between", [nn.MaxPool2d(2), nn.Softmax(1), nn.GroupNorm(2, 6)])
def test_anything_else_between_makes_the_site_relaxed(between: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), between, nn.Conv2d(6, 2, 3))
    assert type(between).__name__ in reasons(net)
    assert only(net, "all").kind == "relaxed"


def test_a_result_with_a_second_reader_is_not_strict() -> None:
    class Net(Functional):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.fc1(x))
            return self.fc2(y) + y.sum()

    assert "sum" in reasons(Net(F.relu))


def test_a_frozen_or_shared_bias_is_not_folded_into() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 5))
    net[4].bias = net[2].bias
    assert {site.constraint for site in bypass_fx.plan(net, mode="strict")} == {"augmented"}
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5))
    net[2].bias.requires_grad_(False)
    assert only(net).constraint == "augmented"


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_gates_are_refused_unless_all_is_asked_for() -> None:
    assert "gate" in reasons(Gated(), "relaxed")
    assert only(Gated(), "all").width == 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.stem(x))
        x = self.act(x + self.body(x))
        return torch.softmax(F.elu(x), -1)


def test_residual_blocks_hold_the_activations_of_one_branch_and_of_the_sum() -> None:
    plan = bypass_fx.plan(Residual(), mode="relaxed")
    assert [site.name for site in plan] == ["act", "body.1"]
    assert {refusal.name for refusal in plan.refusals} == {"sigmoid", "elu"}


def test_the_residual_branch_is_found_across_owners() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    site = only(nn.Sequential(Block()), "auto")
    assert (site.name, site.kind, site.width) == ("0.mlp.2", "relaxed", 8)


def test_strict_reaches_across_owners() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.dense(x))

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.dense(x)  # type: ignore[no-any-return]

    site = only(nn.Sequential(First(), Second()))
    assert (str(site.first), str(site.second), site.constraint) == ("0.dense", "1.dense", "folded")


def test_an_activation_in_a_forward_that_does_not_trace_is_replaced_as_a_module() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 8), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.act(y) if float(y.sum()) > -1e9 else y

    net = nn.Sequential(Dynamic(), nn.Linear(8, 2))
    plan = bypass_fx.plan(net, mode="all")
    assert [refusal.name for refusal in plan.refusals] == ["0.act"] and "not known" in plan.refusals[0].reason
    assert bypass_fx.plan(nn.Sequential(Dynamic()), mode="all").refusals


def test_a_result_that_multiplies_itself_is_no_gate() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.fc1(x))
            return x + self.fc2(y + y * (y / y.norm(dim=1, keepdim=True)))

    assert only(Normed(), "relaxed").activation == "gelu"


def test_example_inputs_settle_what_provenance_does_not() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 8), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.act(y) if y.shape[0] > 0 else y  # type: ignore[no-any-return]

    net = nn.Sequential(Dynamic(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    site = bypass_fx.plan(net, mode="all", example_inputs=(x,)).sites[0]
    assert (site.name, site.width, site.channel_dim) == ("0.act", 8, -1)
    before = net(x)
    bypass_fx.extend(net, mode="all", example_inputs=(x,))
    assert torch.equal(net(x), before) and net.training
    plan = bypass_fx.plan(nn.Sequential(Dynamic()), mode="all", example_inputs=(torch.randn(3, 5),))
    assert "does not run on them" in plan.refusals[0].reason


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = nn.Linear(4, 6), nn.Conv2d(6, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.relu(self.w(x).permute(0, 3, 1, 2)))  # type: ignore[no-any-return]


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = nn.Conv2d(4, 6, 3), nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.w(x).flatten(1)))  # type: ignore[no-any-return]


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.norm, self.a = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.norm(self.w(x)).mean((2, 3))))  # type: ignore[no-any-return]


class Rows(nn.Module):
    """Every step of a sequence is a row while σ is applied."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w(x)
        y = torch.tanh(y.contiguous().view(-1, y.size(-1)))
        return self.a(y.reshape(x.size(0), -1, y.shape[-1]))  # type: ignore[no-any-return]


class Regrouped(Rows):
    """As many numbers a row as another value has."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.w(x).view(-1, x.size(1)))
        return self.a(y.view(x.size(0), x.size(1), -1))  # type: ignore[no-any-return]


def test_a_view_that_may_regroup_the_channels_is_no_wire() -> None:
    assert "view, which moves the channels" in reasons(Regrouped())


@pytest.mark.parametrize(
    ("net", "shape", "channels"),
    [
        (Rows(), (2, 5, 4), (6, -1, ())),
        (Permuted(), (2, 5, 5, 4), (6, -3, ())),
        (Flattened(), (2, 4, 5, 5), (6, -1, (6, -1))),
        (Averaged(), (2, 4, 5, 5), (6, -1, ())),
    ],
)
def test_the_channels_may_be_moved_between_w_and_the_activation(
    net: nn.Module, shape: tuple[int, ...], channels: tuple[int, int, tuple[int, ...]]
) -> None:
    net.double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    before = net(x)
    site = only(net)
    assert (site.width, site.channel_dim, site.view) == channels and site.constraint == "folded"
    bypass_fx.extend(net, mode="strict")
    assert torch.equal(net(x), before)
    assert on_the_variety(net, site)
    with_d = net(x)
    assert not torch.allclose(with_d, before)
    bypass_fx.contract(net)
    assert torch.allclose(net(x), with_d, rtol=0, atol=1e-13)


def test_a_batch_norm_behind_a_permutation_is_not_taken_into_w() -> None:
    class Net(Permuted):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.relu(self.norm(self.w(x).permute(0, 3, 1, 2))))  # type: ignore[no-any-return]

    assert "normalises another axis" in reasons(Net())
