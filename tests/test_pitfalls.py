"""Forwards that are easily read wrongly: each keeps its outputs under extend, or is refused; none is folded by mistake."""

from __future__ import annotations

import functools
import math
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bypass_fx
from bypass_fx.activation import psi
from bypass_fx.passes.errors import UntraceableError
from bypass_fx.passes.trace import Tracing


class Two(nn.Module):
    """W and A, and things that forwards read."""

    width = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)
        self.drop, self.quiet = nn.Dropout(0.5), nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError


def net(body: Any) -> Two:
    return type("Net", (Two,), {"forward": body})()


def constraint(model: nn.Module) -> str | None:
    sites = bypass_fx.plan(model, mode="strict").sites
    return sites[0].constraint if sites else None


def test_equal_classes_with_other_attributes_do_not_share_a_graph() -> None:
    def forward(self: Two, x: Tensor) -> Tensor:
        x = self.extra(x) if hasattr(self, "extra") else x
        return self.b(F.relu(self.a(x))) * self.width  # type: ignore[no-any-return]

    cls = type("Net", (Two,), {"forward": forward})
    blocks = nn.Sequential(cls(), cls(), cls())
    blocks[1].extra = nn.Linear(4, 4)
    blocks[2].width = 0.5
    x = torch.randn(3, 4)
    before = blocks(x)
    bypass_fx.extend(blocks)
    assert torch.equal(blocks(x), before)
    with pytest.raises(bypass_fx.SurgeryError, match="contract the model, set it"):
        blocks[0].width = 2.0


def test_the_mode_of_a_child_is_followed() -> None:
    model = net(lambda s, x: s.b(F.dropout(F.relu(s.a(x)), s.drop.p, s.drop.training)))
    x = torch.randn(64, 4)
    bypass_fx.extend(model, mode="all")
    model.eval()
    assert torch.equal(model(x), model.b(F.relu(model.a(x))))
    model.train()
    assert not torch.equal(model(x), model.b(F.relu(model.a(x))))


class Tenfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 10


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda s, x: s.a(x) if torch.is_grad_enabled() else x, "is_grad_enabled"),
        (lambda s, x: s.a(x) * torch.normal(0.0, 1.0, (1,)).numel(), "random"),
        (lambda s, x: s.a(Tenfold.apply(x)), "autograd function"),
        (lambda s, x: checkpoint(s.a.forward, x, use_reentrant=False), "checkpointing|autograd function"),
    ],
)
def test_what_would_be_frozen_in_is_refused(body: Any, why: str) -> None:
    with pytest.raises(UntraceableError, match=why):
        Tracing(net(body)).trace("")


def test_a_default_list_stays_the_users_own() -> None:
    def forward(self: Two, x: Tensor, seen: list[Any] = []) -> Tensor:  # noqa: B006 - what is tested
        seen.append(1)
        return self.a(x)  # type: ignore[no-any-return]

    with pytest.raises(UntraceableError, match="changes a list"):
        Tracing(net(forward)).trace("")
    assert forward.__defaults__ == ([],)


def test_an_ordered_dict_comes_back_as_one() -> None:
    model = net(lambda s, x: OrderedDict(out=s.b(F.relu(s.a(x)))))
    x = torch.randn(2, 4)
    before = model(x)
    after = bypass_fx.extend(model, mode="all")(x)
    assert type(after) is OrderedDict and torch.equal(after["out"], before["out"])


WRITTEN = {
    "add_": lambda s, z, x: z.add_(x.sum()),
    "setitem": lambda s, z, x: z.__setitem__((slice(None), 0), 1.0),
    "view": lambda s, z, x: z.view(-1).mul_(2.0),
    "in-place module": lambda s, z, x: s.quiet(z),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_value_that_is_overwritten_before_the_activation_is_not_what_w_made(how: str) -> None:
    def forward(self: Two, x: Tensor) -> Tensor:
        z = self.a(x)
        WRITTEN[how](self, z, x)
        return self.b(F.relu(z))  # type: ignore[no-any-return]

    model = net(forward)
    assert constraint(model) is None
    bypass_fx.extend(model, mode="all")(torch.randn(2, 4)).sum().backward()


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.b(F.relu(s.a(x))) + s.b.bias,
        lambda s, x: s.b(F.relu(s.a(x))) + F.linear(s.c(x), s.b.weight, s.b.bias) ** 2,
        lambda s, x: s.b(F.relu(s.a(x))) + s.b(s.c(x)) ** 2,
    ],
)
def test_a_bias_that_something_else_reads_is_not_folded_into(body: Any) -> None:
    assert constraint(net(body)) == "augmented"


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.b(F.relu(s.a(x)) * (1.0 if s.training else 0.5)),
        lambda s, x: s.b(F.relu(s.a(x))) if s.training else s.b(F.relu(s.a(x)) + 1.0),
        lambda s, x: s.b(F.dropout(F.relu(s.a(x)), 0.5)),
    ],
)
def test_a_forward_that_does_otherwise_in_eval_mode_has_no_strict_site(body: Any) -> None:
    assert constraint(net(body)) is None


def test_a_dropout_inside_makes_the_fold_exact_in_eval_mode_only_whatever_the_bias() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    assert bypass_fx.plan(model, mode="strict").sites[0].exact == "eval"
    assert not bypass_fx.plan(model, mode="auto").sites


@pytest.mark.parametrize("which", ["hook", "pre-hook", "instance forward"])
def test_a_module_that_does_more_than_its_class_is_no_affine_map(which: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    if which == "hook":
        model[0].register_forward_hook(lambda _, __, result: result.sin())
    elif which == "pre-hook":
        model[2].register_forward_pre_hook(lambda _, args: (args[0].sin(),))
    else:
        model[0].forward = torch.sin
    assert constraint(model) is None


def test_a_convolution_with_its_own_arithmetic_is_no_affine_map() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, (weight - weight.mean()) / weight.std(), bias)

    assert constraint(nn.Sequential(Standardised(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))) is None
    assert constraint(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Standardised(6, 2, 3))) is None


@pytest.mark.parametrize("act", [F.relu, torch.abs, lambda x: x.clamp(min=0)])
def test_a_linear_with_a_bend_is_no_look_alike(act: Any) -> None:
    class Bent(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
            return act(super().forward(input))  # type: ignore[no-any-return]

    assert constraint(nn.Sequential(Bent(4, 8), nn.Tanh(), nn.Linear(8, 4))) is None


def test_a_wrong_width_is_an_error_and_never_a_broadcast() -> None:
    z = torch.ones(2, 1)
    with pytest.raises(bypass_fx.BypassError, match="met 1 channels"):
        psi(z, z, torch.zeros(3), -1)
    with pytest.raises(bypass_fx.BypassError, match="met 0 channels"):
        psi(z.sum(), z.sum(), torch.zeros(1), -1)


def test_parts_that_were_extended_one_by_one_are_not_mixed_up() -> None:
    model = nn.Sequential(net(lambda s, x: s.b(F.relu(s.a(x)))), net(lambda s, x: s.b(F.relu(s.a(x)))))
    for part in model:
        bypass_fx.extend(part)
    with pytest.raises(bypass_fx.SurgeryError, match="one by one"):
        bypass_fx.contract(model)
    for part in model:
        bypass_fx.contract(part)
    bypass_fx.extend(model)


def test_an_infinite_bound_of_a_clamp_brings_no_infinity() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
            self.register_buffer("least", torch.tensor(-math.inf))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(torch.clamp(self.fc1(x), self.least, torch.tensor(1.0).to(x))))  # type: ignore[no-any-return]

    class Plain(Clipped):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x).clamp(min=-math.inf, max=math.inf)))  # type: ignore[no-any-return]

    assert len(bypass_fx.plan(Plain(), mode="all")) == 1
    assert len(bypass_fx.plan(Clipped(), mode="all")) == 1


class Table:
    """Remembers what was computed, as a plain object."""

    def __init__(self) -> None:
        self.known: dict[str, Tensor] = {}

    def get(self, like: Tensor) -> Tensor:
        if "table" not in self.known:
            self.known["table"] = torch.arange(6.0, device=like.device)
        return self.known["table"]


@functools.lru_cache
def remembered(count: int) -> Tensor:
    return torch.arange(float(count))


@pytest.mark.parametrize("where", ["object", "list", "function"])
def test_what_a_forward_remembers_outside_its_module_holds_no_traced_value_afterwards(where: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 4)
            self.table, self.tables = Table(), [Table()]

        def forward(self, x: Tensor) -> Tensor:
            kept = {"object": self.table.get, "list": self.tables[0].get, "function": lambda _: remembered(6)}[where](x)
            return self.out(torch.relu((self.fc(x) + kept).roll(1, -1)))  # type: ignore[no-any-return]

    remembered.cache_clear()
    model, x = Net(), torch.randn(2, 4)
    bypass_fx.plan(model, mode="all", example_inputs=(x,))
    after = model(x)
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, fresh(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_child_is_no_part_of_a_strict_site_and_no_obstacle() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(2, 4)
    before = model(x)
    assert not bypass_fx.plan(model, mode="strict").sites
    assert torch.equal(bypass_fx.extend(model, mode="all", example_inputs=(x,))(x), before)
    around = net(lambda s, x: s.b(F.relu(s.a(s.scripted(x)))))
    around.scripted = torch.jit.script(nn.Linear(4, 4))
    assert [site.kind for site in bypass_fx.plan(around)] == ["strict"]


class Twice(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x + 1)


def test_a_child_that_is_called_in_a_way_of_its_own_is_refused() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(s.twice(x)))))
    model.twice = Twice(4, 4)
    (refusal,) = bypass_fx.plan(model, mode="all").refusals
    assert "a `__call__` of its own" in refusal.reason


@pytest.mark.parametrize(
    "roll",
    [random.random, lambda: float(np.random.rand()), lambda: float(torch.normal(0.0, 1.0, (1,)))],
    ids=["python", "numpy", "torch"],
)
def test_a_trace_that_is_refused_leaves_the_generators_as_they_were(roll: Any) -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x))) * roll())
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert not bypass_fx.plan(model, mode="all").sites
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_a_shape_is_read_where_the_forward_reads_it() -> None:
    def body(s: Any, x: Any) -> Any:
        y = s.a(x)
        shape = y.shape
        y.unsqueeze_(0)
        return y.new_ones(shape[0])

    own, x = net(body), torch.randn(3, 4)
    graph = torch.fx.GraphModule(own, Tracing(own).trace("").graph)
    assert torch.equal(graph(x), own(x)) and len(own(x)) == 3


def test_a_container_of_traced_values_that_a_property_makes_does_not_lead_to_the_tracer() -> None:
    class Making(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out, self.scale = nn.Linear(4, 6), nn.Linear(6, 4), nn.Parameter(torch.ones(6))

        @property
        def made(self) -> dict[str, Tensor]:
            return {"scale": self.scale}

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.fc(x) * self.made["scale"]))  # type: ignore[no-any-return]

    model, x = Making(), torch.randn(3, 4)
    before = model(x)
    assert torch.equal(bypass_fx.extend(model, mode="all")(x), before)


def test_what_a_forward_asks_of_its_base_class_is_seen() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return F.silu(self.fc(x)) if x is other else torch.relu(self.fc(x))

    class Derived(Base):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return super().forward(x, x if other is None else other)

    plan = bypass_fx.plan(Derived(), mode="all")
    assert not plan.sites and {refusal.activation for refusal in plan.refusals} == {"silu", "relu"}
    assert "the same object" in plan.refusals[0].reason
