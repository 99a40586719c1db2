"""The value path of attention, ψ(V) = Attn(V) + D V: found in every form, exact, and folded away where A D W_V = 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.matrices import columns, rows
from tests.attentions import ATTENTIONS, HEADS, Attention, Multihead


def attention_site(net: nn.Module, **as_plan: Any) -> bypass_fx.Site:
    (site,) = [site for site in bypass_fx.plan(net, **as_plan) if site.activation == "attention"]
    return site


def refusal(net: nn.Module) -> str:
    plan = bypass_fx.plan(net, mode="strict")
    assert not [site for site in plan if site.activation == "attention"]
    (found,) = [refusal for refusal in plan.refusals if refusal.activation == "attention"]
    return found.reason


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_every_form_is_a_strict_site_that_comes_back_with_d_not_zero(name: str, bias: bool, x: Tensor) -> None:
    torch.manual_seed(1)
    net = ATTENTIONS[name](bias=bias).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    before = net(x)
    bypass_fx.extend(net, mode="strict")
    (site,) = bypass_fx.sites(net)
    assert (site.kind, site.activation, site.constraint, site.width) == ("strict", "attention", "folded", 8)
    assert torch.equal(net(x), before)
    assert site.first is not None and site.second is not None
    delta = net.get_parameter(site.parameter)
    with torch.no_grad():
        delta.copy_(torch.randn(8))
        away = net(x)
        assert not torch.allclose(away, before)
        # A' = A (I − M M⁺) with M = D W_V of rank 3: then A' D W_V = 0
        w = net.get_parameter(site.first.weight)
        low_rank = torch.randn(w.shape[0], 3, dtype=w.dtype) @ torch.randn(3, w.shape[1], dtype=w.dtype)
        w.copy_(low_rank.view_as(w))
        m = delta[:, None] * rows(net, site.first)[0]
        a = net.get_parameter(site.second.weight)
        a.copy_(
            (
                columns(net, site.second, 8)[0] @ (torch.eye(8, dtype=m.dtype) - m @ torch.linalg.pinv(m, rtol=1e-9))
            ).view_as(a)
        )
    assert float(bypass_fx.norms(net)[site.name]) < 1e-12
    with_d = net(x)
    report = bypass_fx.contract(net)
    assert torch.allclose(net(x), with_d, rtol=0, atol=1e-11)
    assert (report.sites[0].bias_shift > 0) == bias


@pytest.mark.parametrize("name", sorted(ATTENTIONS))
def test_delta_gets_a_gradient_and_d_v_is_what_is_added(name: str, x: Tensor) -> None:
    net = bypass_fx.extend(ATTENTIONS[name]().double(), mode="strict")
    (site,) = bypass_fx.sites(net)
    delta = net.get_parameter(site.parameter)
    net(x).square().sum().backward()
    assert delta.grad is not None and float(delta.grad.abs().min()) > 0


def test_the_fused_kernel_of_inference_stays_and_d_counts_in_it(x: Tensor) -> None:
    """torch runs MultiheadAttention as one kernel where no gradient is wanted; the values are hidden in it."""
    net = Multihead().double().eval()
    with torch.no_grad():
        fused = net(x)
        bypass_fx.extend(net, mode="strict")
        assert torch.equal(net(x), fused)
        net.attn.get_parameter("delta_attention").copy_(torch.randn(8))
        assert torch.allclose(net(x), net.requires_grad_()(x), atol=1e-12) and not torch.allclose(net(x), fused)
    with torch.enable_grad():
        assert torch.allclose(net(x).detach(), net.attn(x, x, x, need_weights=False)[0].detach(), atol=1e-12)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_with_masks_and_dropout_is_exact(need_weights: bool, train: bool, x: Tensor) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, HEADS, dropout=0.2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
            padding = torch.zeros(3, 5, dtype=x.dtype)
            mixed, weights = self.attn(x, x, x, padding, need_weights, causal)
            return mixed if weights is None else mixed + weights.sum(-1, keepdim=True)  # type: ignore[no-any-return]

    net = Masked().double().train(train)
    torch.manual_seed(0)
    before = net(x)
    bypass_fx.extend(net)
    torch.manual_seed(0)
    assert torch.equal(net(x), before)
    bypass_fx.contract(net)
    assert type(net.attn) is nn.MultiheadAttention and not net.attn._forward_pre_hooks


def test_a_position_embedding_on_queries_and_keys_leaves_a_site(x: Tensor) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.position = (
                nn.MultiheadAttention(8, HEADS, batch_first=True),
                nn.Parameter(torch.randn(5, 8)),
            )

        def forward(self, x: Tensor) -> Tensor:
            q = k = x + self.position
            return x + self.attn(q, k, value=x)[0]  # type: ignore[no-any-return]

    assert attention_site(Encoder()).view == (HEADS, 1, 4)


def test_attention_to_another_sequence_is_refused() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, HEADS, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.attn(x, memory, memory)[0]  # type: ignore[no-any-return]

    assert "come from different places" in refusal(Cross())


def test_attention_from_one_query_is_refused() -> None:
    class ClassAttention(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(x)
            mixed = F.scaled_dot_product_attention(q[:, :, :1], k, v)
            return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    assert "other queries than values" in refusal(ClassAttention())


def test_values_that_are_more_than_moved_are_refused() -> None:
    class Scaled(Attention):
        def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().split(x)
            return q, k, torch.tanh(v) * 2

    plan = bypass_fx.plan(Scaled(), mode="strict")
    assert "not only moved" in next(r.reason for r in plan.refusals if r.activation == "attention")


def test_a_head_order_that_the_output_projection_changes_is_refused() -> None:
    class Reordered(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(x)
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.proj(mixed.permute(0, 2, 3, 1).flatten(2))  # type: ignore[no-any-return]

    assert "another order" in refusal(Reordered())


def test_positions_that_are_mixed_up_with_channels_are_refused() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, channels = x.shape
            q, k, v = self.qkv(x).chunk(3, -1)
            mixed = F.scaled_dot_product_attention(q, k, v)
            return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, channels))  # type: ignore[no-any-return]

    assert "several positions" in refusal(Stacked())


def test_a_residual_map_without_a_bias_takes_the_augmented_form(x: Tensor) -> None:
    net = Attention().double()
    net.proj = nn.Linear(8, 8, bias=False).double()
    site = attention_site(net)
    assert site.constraint == "augmented" and site.first is not None and site.first.part == ((16, 24),)
    bypass_fx.extend(net)
    with torch.no_grad():
        net.qkv.weight[16:] = 0
        net.get_parameter(site.parameter).fill_(1.0)
    shift = net.proj.weight @ net.qkv.bias[16:]
    assert float(bypass_fx.norms(net)[site.name]) == pytest.approx(float(shift.detach().norm()))


def test_sites_of_attention_go_to_json_and_back() -> None:
    plan = bypass_fx.plan(nn.Sequential(Attention(), Multihead()))
    assert [site.activation for site in plan] == ["attention"] * 2
    assert bypass_fx.Plan.from_json(plan.to_json()) == plan


def test_attention_is_refused_in_relaxed_mode_and_taken_in_all_others() -> None:
    net = nn.Sequential(Attention(), Multihead())
    assert [r.reason for r in bypass_fx.plan(net, mode="relaxed").refusals] == ["attention has no relaxed bypass"] * 2
    assert all(len(bypass_fx.plan(net, mode=mode)) == 2 for mode in ("auto", "strict", "all"))  # type: ignore[arg-type]


def test_other_lengths_than_planned_for_give_a_clear_error(x: Tensor) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Multihead()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    net = bypass_fx.extend(Either().double())
    with pytest.raises(bypass_fx.BypassError, match="as many queries as values"):
        net.inner.attn(x[:, :2], x, x)


def test_attention_compiles_in_one_graph(x: Tensor) -> None:
    net = bypass_fx.extend(nn.Sequential(Attention(), Multihead()).double())
    with torch.no_grad():
        for site in bypass_fx.sites(net):
            net.get_parameter(site.parameter).normal_()
    compiled = torch.compile(net, fullgraph=True)
    assert torch.allclose(compiled(x), net(x), atol=1e-12)


def test_attention_in_a_forward_without_a_graph_is_refused() -> None:
    class Branching(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else F.scaled_dot_product_attention(x, x, x)

    assert "branches on a traced value" in refusal(Branching())


def test_a_default_device_does_not_matter() -> None:
    expected = bypass_fx.plan(Attention())
    with torch.device("meta"):
        assert bypass_fx.plan(Attention()) == expected


def test_a_map_that_is_also_used_without_the_module_takes_the_augmented_form() -> None:
    class Reused(Multihead):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + F.linear(x, self.attn.out_proj.weight, self.attn.out_proj.bias)

    assert attention_site(Reused()).constraint == "augmented"


def test_two_modules_may_share_their_output_projection(x: Tensor) -> None:
    net = nn.Sequential(Multihead(), Multihead()).double()
    net[1].attn.out_proj = net[0].attn.out_proj
    before = net(x)
    assert [site.constraint for site in bypass_fx.plan(net)] == ["augmented", "augmented"]
    assert torch.equal(bypass_fx.extend(net)(x), before)


def test_weights_that_a_forward_replaces_are_no_site() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Multihead()

        def forward(self, x: Tensor) -> Tensor:
            doubled = {name: parameter * 2 for name, parameter in self.inner.named_parameters()}
            return torch.func.functional_call(self.inner, doubled, (x,))  # type: ignore[no-any-return]

    assert "with other weights" in refusal(Doubled())


def test_planning_is_no_step_of_a_spectral_norm() -> None:
    net = Multihead()
    torch.nn.utils.parametrizations.spectral_norm(net.attn, "in_proj_weight")
    before = {name: value.clone() for name, value in net.train().state_dict().items()}
    attention_site(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_an_owner_whose_callers_are_not_seen_may_be_passed_a_cache() -> None:
    class Cached(Attention):
        def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
            q, k, v = self.split(x)
            mixed = F.scaled_dot_product_attention(q, k, v if past is None else torch.cat([past, v], 2)[:, :, -5:])
            return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    class Untraceable(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x) if x.sum() > 0 else self.inner(x)  # type: ignore[no-any-return]

    class HandsOn(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
            return self.inner(x, past=past)  # type: ignore[no-any-return]

    class HandsAllOn(HandsOn):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return self.inner(x, **kwargs)  # type: ignore[no-any-return]

    class HandsNothingOn(HandsOn):
        def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    assert "its calls are not seen" in refusal(Untraceable(Cached()))
    assert "its calls are not seen" in refusal(Untraceable(HandsOn(Cached())))
    assert "its calls are not seen" in refusal(Untraceable(HandsAllOn(Cached())))
    attention_site(Untraceable(HandsNothingOn(Cached())))
    attention_site(Untraceable(Attention()))


def test_a_map_that_reads_the_heads_in_two_orders_is_refused() -> None:
    class TwoOrders(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(x)
            mixed = F.scaled_dot_product_attention(q, k, v)
            reordered = self.proj(mixed.permute(0, 2, 3, 1).flatten(2))
            return self.proj(mixed.transpose(1, 2).flatten(2)) + reordered  # type: ignore[no-any-return]

    assert "another order" in refusal(TwoOrders())


def test_a_mask_over_a_fixed_number_of_windows_does_not_hide_the_queries() -> None:
    class Shifted(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.zeros(16, 5, 5))  # 16 windows of 5 positions

        def forward(self, x: Tensor) -> Tensor:
            windows, tokens, _ = x.shape
            q, k, v = self.split(x)
            scores = (q @ k.transpose(-2, -1)).view(-1, self.mask.shape[0], HEADS, tokens, tokens)
            weights = (scores + self.mask[:, None]).view(-1, HEADS, tokens, tokens).softmax(dim=-1)
            return self.proj((weights @ v).transpose(1, 2).reshape(windows, tokens, -1))  # type: ignore[no-any-return]

    assert attention_site(Shifted()).view == (HEADS, 1, 4)


class PartlyTurned(nn.Module):
    """A rotary embedding of unknown width turns a part of queries and keys; with `values`, of the values too."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.values, self.qkv, self.out = values, nn.Linear(8, 24), nn.Linear(8, 8)

    def turned(self, x: Tensor, cos: Tensor) -> Tensor:
        width = cos.shape[-1]
        return torch.cat((x[..., :width] * cos, x[..., width:]), dim=-1)

    def forward(self, x: Tensor, cos: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        q, k = self.turned(q, cos), self.turned(k, cos)
        v = self.turned(v, cos) if self.values else v
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class WithCos(nn.Module):
    """Nothing that is seen tells how wide cos is."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.attention = PartlyTurned(values)

    def forward(self, x: Tensor, cos: Tensor) -> Tensor:
        return x + self.attention(x, cos)  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_partial_rotary_embedding_of_unknown_width_keeps_the_number_of_queries(width: int) -> None:
    model, x, cos = WithCos(values=False).double(), torch.randn(2, 5, 8).double(), torch.rand(5, width).double()
    expected = model(x, cos)
    bypass_fx.extend(model)
    assert [site.activation for site in bypass_fx.sites(model)] == ["attention"]
    assert torch.equal(model(x, cos), expected)
    assert not bypass_fx.plan(WithCos(values=True)).sites
