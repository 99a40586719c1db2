"""Owners that code without a graph calls in ways that the plan did not see."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bypass_fx
from bypass_fx.surgery import delta_of


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.act(self.first(x)))
        return out


class Modulation(nn.Module):
    """Its W stands in a child that has a site of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.last = Embedding(), nn.SiLU(), nn.Linear(8, 2)

    def forward(self, x: Tensor, shift: int | None = None) -> Tensor:
        out: Tensor = self.last(self.act(self.inner(x if shift is None else x + shift)))
        return out


class Unseen(nn.Module):
    """Calls a child as no graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = Modulation()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.modulation(x, shift=int(x.shape[0]) if x.sum() < 1e9 else None)
        return out


def test_a_call_of_a_kind_not_seen_before_finds_w_in_a_child_that_is_extended_too() -> None:
    torch.manual_seed(0)
    model, x = Unseen(), torch.randn(3, 4)
    before = model(x)
    plan = bypass_fx.plan(model, mode="strict")
    assert [site.name for site in plan] == ["modulation.act", "modulation.inner.act"]
    bypass_fx.extend(model, plan)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for site in plan:
            delta_of(model, site).normal_()
    assert not torch.allclose(model(x), before)
    bypass_fx.contract(model)
    assert type(model.modulation) is Modulation and type(model.modulation.inner) is Embedding


class Shifted(nn.Module):
    """Its defaults are no call that anybody makes: the activation has no input then."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = nn.SiLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        out: Tensor = x + self.last(self.act(shift))
        return out


class Unconditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Shifted()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x, shift=2 * x) if x.sum() < 1e9 else x
        return out


def test_a_forward_whose_defaults_give_the_activation_no_input_is_extended_for_the_calls_that_do() -> None:
    torch.manual_seed(0)
    model, x = Unconditional(), torch.randn(3, 4)
    before = model(x)
    bypass_fx.extend(model, mode="all")
    assert torch.equal(model(x), before)
    (site,) = bypass_fx.sites(model)
    with torch.no_grad():
        delta_of(model, site).fill_(1.0)
    assert torch.allclose(model(x), before + model.block.last(2 * x) - model.block.last.bias, atol=1e-6)
    bypass_fx.contract(model)
    assert torch.equal(model(x), before)


def test_of_a_loop_over_an_axis_the_modules_are_reached_and_the_function_is_refused_with_the_reason() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
            self.act, self.head = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x[:, 0]
            for t in range(x.shape[1]):
                h = F.gelu(self.act(self.cell(x[:, t] + h)))
            return self.head(h)  # type: ignore[no-any-return]

    plan = bypass_fx.plan(Recurrent(), mode="all", example_inputs=(torch.randn(2, 3, 4),))
    assert [(site.name, site.kind) for site in plan] == [("cell.1", "strict"), ("act", "relaxed")]
    (refusal,) = plan.refusals
    assert refusal.activation == "gelu" and "needs the number that a size is, as `range(x.shape[1])`" in refusal.reason


def test_an_attention_that_a_checkpointed_helper_may_pass_a_context_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            context = x if context is None else context
            mixed = F.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context))
            return self.out(mixed)  # type: ignore[no-any-return]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_itself, self.across = Attention(), Attention()

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            out: Tensor = checkpoint(self._forward, x, context, use_reentrant=False)
            return out

        def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            x = x + self.to_itself(x)
            out: Tensor = x + self.across(x, context=context)
            return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            out: Tensor = self.block(x, context)
            return out

    x, context = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    for net, inputs in ((Net(), (x, context)), (Block(), (x, context)), (Net(), None)):
        plan = bypass_fx.plan(net, example_inputs=inputs)
        assert [site.owner.split(".")[-1] for site in plan] == ["to_itself"]
        assert [refusal.owner.split(".")[-1] for refusal in plan.refusals] == ["across"]
        assert "its calls are not seen" in plan.refusals[0].reason
        before = net(x, context)
        assert torch.equal(bypass_fx.extend(net, plan, example_inputs=inputs)(x, context), before)


def test_a_block_that_hands_on_whatever_it_is_given_is_planned_without_examples_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x + torch.softmax(self.q(x) @ y.transpose(-2, -1), -1) @ self.v(y), y

    class HandsOn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.both = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), Both()

        def forward(self, *values: Tensor) -> Any:
            return self.both(*(self.mlp(each) for each in values))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(HandsOn() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            values: Any = [x, x]
            for block in self.blocks:
                values = block(*values)
            return values[0]  # type: ignore[no-any-return]

    model, x = Model(), torch.randn(2, 3, 4)
    for inputs in (None, (x,)):
        plan = bypass_fx.plan(model, mode="strict", example_inputs=inputs)
        assert [site.name for site in plan if site.activation == "relu"] == ["blocks.0.mlp.1", "blocks.1.mlp.1"]
