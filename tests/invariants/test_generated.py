"""The invariants of DESIGN.md 5 on generated architectures."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bypass_fx
from bypass_fx.constraint import residual
from bypass_fx.passes.matrices import columns, offset, rows
from bypass_fx.passes.plan import MODES, Mode, Site
from tests.architectures import GeneratedNet, nets, run

modes = st.sampled_from(MODES)
many = settings(max_examples=60)
folding = settings(max_examples=300)


def extended(net: GeneratedNet, mode: Mode) -> GeneratedNet:
    try:
        return bypass_fx.extend(net, mode=mode, example_inputs=net.arguments(net.example()))
    except bypass_fx.PlanError:
        return bypass_fx.extend(net, mode="all", example_inputs=net.arguments(net.example()))


@given(nets(), modes, st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@many
def test_embed_is_exact(net: GeneratedNet, mode: Mode, train: bool, dtype: torch.dtype) -> None:
    net.to(dtype)
    x = net.example(dtype)
    before = run(net, x, train)
    after = run(extended(net, mode), x, train)
    assert torch.equal(before, after)
    assert after.dtype == before.dtype and after.stride() == before.stride()


@given(nets(), modes, st.booleans())
@settings(max_examples=40)
def test_embed_is_exact_under_autocast(net: GeneratedNet, mode: Mode, train: bool) -> None:
    x = net.example()
    with torch.autocast("cpu", torch.bfloat16):
        before = run(net, x, train)
        after = run(extended(net, mode), x, train)
    assert torch.equal(before, after) and after.dtype == before.dtype


@given(nets(), modes)
@many
def test_parameters_stay_the_same_objects_and_only_deltas_are_new(net: GeneratedNet, mode: Mode) -> None:
    before = dict(net.named_parameters())
    extended(net, mode)
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    new = set(after) - set(before)
    assert new and all("delta" in name for name in new)
    assert new == {site.parameter for site in bypass_fx.sites(net)}


@given(nets(), modes)
@many
def test_contract_leaves_no_trace(net: GeneratedNet, mode: Mode) -> None:
    fresh = copy.deepcopy(net)
    before = {path: (type(module), set(module.__dict__)) for path, module in net.named_modules()}
    flags = {path: module.inplace for path, module in net.named_modules() if hasattr(module, "inplace")}
    extended(net, mode)
    bypass_fx.contract(net)
    assert {path: (type(module), set(module.__dict__)) for path, module in net.named_modules()} == before
    assert {path: module.inplace for path, module in net.named_modules() if hasattr(module, "inplace")} == flags
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(run(fresh, net.example(), False), run(net, net.example(), False))


@given(nets(), modes, st.booleans())
@settings(max_examples=30)
def test_every_delta_gets_the_gradient_of_its_direct_formula(net: GeneratedNet, mode: Mode, train: bool) -> None:
    """∂L/∂δ equals the change of the loss when δ moves, in float64."""
    net.double()
    extended(net, mode)
    x = net.example(torch.float64)
    run(net, x, train).square().sum().backward()
    for site in bypass_fx.sites(net):
        delta = net.get_parameter(site.parameter)
        assert delta.grad is not None and delta.shape == (site.width,)
        there = float(run(net, x, train).detach().square().sum())
        slopes = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                delta[0] += step
                slopes.append((float(run(net, x, train).square().sum()) - there) / step)
                delta[0] -= step
        if slopes[0] == pytest.approx(slopes[1], rel=1e-3, abs=1e-4):  # else a kink of σ lies at this very point
            assert float(delta.grad[0]) == pytest.approx(sum(slopes) / 2, rel=1e-2, abs=1e-3)


def on_the_variety(net: nn.Module, site: Site) -> bool:
    """Change W so that the site's constraint holds exactly with D ≠ 0: A D [W b_W] = 0 for a D that is 1 on two channels.

    Two channels whose rows of W (and, for the augmented form, whose b_W) are the same and whose columns of A are
    opposite cancel. Answers whether such a pair could be made.
    """
    assert site.first is not None and site.second is not None
    w = rows(net, site.first)
    a = columns(net, site.second, site.width)
    of_w, of_a = w.shape[0], a.shape[0]
    same_group = [
        (i, j)
        for i in range(site.width)
        for j in range(i + 1, site.width)
        if i * of_w // site.width == j * of_w // site.width and i * of_a // site.width == j * of_a // site.width
    ]
    if not same_group:
        return False
    i, j = same_group[0]
    first, second = (net.get_parameter(name) for name in (site.first.weight, site.second.weight))
    made = [output for start, stop in site.first.part for output in range(start, stop)] or range(site.width)
    of_i, of_j = made[i], made[j]  # of a fused projection, channel i is another output
    with torch.no_grad():
        first[of_j] = first[of_i]
        if site.first.norm is not None:
            norm = net.get_submodule(site.first.norm)
            shared = ["weight", "running_var"] + (["bias", "running_mean"] if site.constraint == "augmented" else [])
            for name in shared:
                values = getattr(norm, name)
                values[j] = values[i]
        if site.constraint == "augmented" and site.first.bias is not None:
            bias = net.get_parameter(site.first.bias)
            bias[of_j] = bias[of_i]
        if site.second.op == "linear":
            taps = second.shape[1] // site.width  # behind a flatten, a channel is a run of inputs
            second[:, j * taps : (j + 1) * taps] = -second[:, i * taps : (i + 1) * taps]
        else:
            per = site.width // of_a
            out = second.shape[0] // of_a
            group = i // per
            block = second[group * out : (group + 1) * out]
            block[:, j % per] = -block[:, i % per]
        delta = net.get_parameter(site.parameter)
        delta.zero_()
        delta[i] = delta[j] = 0.8
    return True


def expect_exact_fold(net: nn.Module, site: Site, x: Tensor) -> None:
    """Meet the site's constraint with D ≠ 0: the contraction changes no output then."""
    before = net(x)
    assert on_the_variety(net, site)
    moved = net(x)
    assert not torch.allclose(moved, before)
    bypass_fx.contract(net)
    torch.testing.assert_close(net(x), moved)


@given(nets())
@folding
def test_where_the_constraint_holds_contraction_changes_nothing(net: GeneratedNet) -> None:
    net.double().eval()
    x = net.example(torch.float64)
    try:
        bypass_fx.extend(net, mode="strict", example_inputs=net.arguments(net.example()))
    except bypass_fx.PlanError:
        return
    # A site's A may be the next one's W: the sites are put on their varieties one after the other, never two that touch
    taken: set[str] = set()
    for site in bypass_fx.sites(net):
        assert site.first is not None and site.second is not None
        weights = {site.first.weight, site.second.weight}
        if not weights & taken and on_the_variety(net, site):
            taken |= weights
    before = run(net, x, False).detach()
    assert all(value < 1e-9 for value in bypass_fx.norms(net).values())
    bypass_fx.contract(net)
    after = run(net, x, False).detach()
    assert float((after - before).abs().max()) <= 1e-12 * max(1.0, float(before.abs().max()))


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def void(_: object) -> None:
    """A hook's answer that leaves the module's result alone."""


@given(nets(), st.integers(0, 2**16))
@folding
def test_elsewhere_the_output_of_a_moves_by_at_most_the_residual_times_the_input(net: GeneratedNet, seed: int) -> None:
    """One site alone is given a random D, all others stay at 0: |ΔA's output| ≤ ‖ADW‖ ‖u‖ at every position."""
    net.double().eval()
    try:
        bypass_fx.extend(net, mode="strict", example_inputs=net.arguments(net.example()))
    except bypass_fx.PlanError:
        return
    site = bypass_fx.sites(net)[seed % len(bypass_fx.sites(net))]
    assert site.first is not None and site.second is not None
    delta = net.get_parameter(site.parameter)
    with torch.no_grad():
        delta.copy_(torch.randn(site.width, generator=torch.Generator().manual_seed(seed)))
    value = float(residual(net, site).detach())
    seen: dict[str, Tensor] = {}
    second = net.get_submodule(site.second.name) if site.second.name in dict(net.named_modules()) else None
    first = net.get_submodule(site.first.name)
    if isinstance(first, nn.MultiheadAttention):  # it applies its output projection without calling it
        second = first
    if second is None:
        return
    hooks = [
        # the first call of each: where the blocks run twice, the second call reads what the first one changed
        first.register_forward_pre_hook(lambda _, args: void(seen.setdefault("u", args[0]))),
        second.register_forward_hook(lambda _, __, result: void(seen.setdefault("a", _first(result)))),
    ]
    x = net.example(torch.float64)
    run(net, x, False)
    extended_a = seen.pop("a").detach()
    had_offset = offset(net, site.first) is not None
    bypass_fx.contract(net)
    run(net, x, False)
    for hook in hooks:
        hook.remove()
    if "u" not in seen:  # W is applied as a function: its input is not seen by a hook
        return
    # every entry of A's output reads a patch of u; the whole of u bounds it, with 1 for b_W in the augmented form
    u = float(cast(Tensor, seen["u"]).detach().flatten(1).norm(dim=1).max())
    if site.constraint == "augmented" and had_offset:
        u += float(extended_a[0, 0].numel())
    moved = (extended_a - seen["a"].detach()).flatten(1).norm(dim=1).max()
    taps = max(1, site.second.taps) * max(1, site.first.taps)
    assert float(moved) <= value * u * taps + 1e-9


def test_a_model_is_as_it_was_when_extend_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = bypass_fx.plan(net)
    wrong = bypass_fx.Plan(
        (plan.sites[0], copy.copy(plan.sites[1]).__class__(**{**_fields(plan.sites[1]), "call": "gone"}))
    )
    with pytest.raises(bypass_fx.PlanError, match="gone"):
        bypass_fx.extend(net, wrong)
    assert type(net) is nn.Sequential and list(net.state_dict()) == list(before)


def _fields(site: Site) -> dict[str, object]:
    return {name: getattr(site, name) for name in Site.__dataclass_fields__}
