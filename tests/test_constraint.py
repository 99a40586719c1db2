"""‖A D W‖, its gradient and Theorem 2."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bypass_fx
from bypass_fx.constraint import residual
from bypass_fx.surgery import delta_of


def extended(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with a random D at every site, in float64."""
    generator = torch.Generator().manual_seed(seed)
    bypass_fx.extend(net.double(), mode="strict")
    with torch.no_grad():
        for site in bypass_fx.sites(net):
            delta_of(net, site).copy_(torch.randn(site.width, generator=generator))
    return net


def dense(net: nn.Sequential) -> nn.Module:
    return extended(net)


def test_the_norm_of_a_dense_site_is_that_of_the_matrix_product() -> None:
    net = extended(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    first, _, second = net.children()
    d = delta_of(net, bypass_fx.sites(net)[0])
    expected = torch.linalg.matrix_norm(second.weight @ torch.diag(d) @ first.weight)  # type: ignore[operator]
    assert torch.allclose(bypass_fx.norms(net)["1"], expected.detach())


def test_the_augmented_norm_counts_the_bias_as_one_more_column() -> None:
    net = extended(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)))
    first, _, second = net.children()
    d = delta_of(net, bypass_fx.sites(net)[0])
    w = torch.cat([first.weight, first.bias[:, None]], 1)  # type: ignore[index,list-item]
    expected = torch.linalg.matrix_norm(second.weight @ torch.diag(d) @ w)
    assert torch.allclose(bypass_fx.norms(net)["1"], expected.detach())


@pytest.mark.parametrize(("of_w", "of_a"), [(1, 1), (2, 1), (1, 3), (2, 4), (12, 2), (2, 3), (12, 12)])
def test_grouped_convolutions_have_the_norm_of_the_dense_product(of_w: int, of_a: int) -> None:
    """Against the Jacobian of A ∘ D ∘ W on a patch: its taps composed, written out."""
    net = nn.Sequential(
        nn.Conv1d(12, 12, 2, groups=of_w, bias=False), nn.ReLU(), nn.Conv1d(12, 12, 3, groups=of_a, bias=False)
    )
    w, a = net[0].weight.detach().double(), net[2].weight.detach().double()
    extended(net)
    d = delta_of(net, bypass_fx.sites(net)[0]).detach()
    w_dense, a_dense = torch.zeros(12, 12, 2).double(), torch.zeros(12, 12, 3).double()
    for weight, wide, groups in ((w, w_dense, of_w), (a, a_dense, of_a)):
        size = 12 // groups
        for g in range(groups):
            wide[g * size : (g + 1) * size, g * size : (g + 1) * size] = weight[g * size : (g + 1) * size]
    products = [a_dense[:, :, u] @ torch.diag(d) @ w_dense[:, :, v] for u in range(3) for v in range(2)]
    expected = math.sqrt(sum(float(product.square().sum()) for product in products))
    assert float(bypass_fx.norms(net)["1"]) == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=60)
def test_theorem_2_the_gradient_vanishes_only_where_the_norm_does(m: int, n: int, l: int, seed: int) -> None:  # noqa: E741
    """∇‖A D W‖ ≠ 0 whenever A D W ≠ 0, and it has the closed form of eq. 21 (of ‖ADW‖², halved and divided by ‖ADW‖)."""
    torch.manual_seed(seed)
    net = extended(nn.Sequential(nn.Linear(l, n), nn.ReLU(), nn.Linear(n, m)), seed)
    site = bypass_fx.sites(net)[0]
    w, a, d = net[0].weight, net[2].weight, delta_of(net, site)  # type: ignore[index]
    value = residual(net, site)
    by_autograd = torch.autograd.grad(value, (a, d, w))  # type: ignore[arg-type]
    matrix = torch.diag(d)
    product = a @ matrix @ w  # type: ignore[operator]
    closed = (
        product @ w.t() @ matrix,  # type: ignore[operator]
        torch.diag(w @ w.t() @ matrix @ a.t() @ a),  # type: ignore[operator]
        matrix @ a.t() @ product,  # type: ignore[operator]
    )
    assert float(value.detach()) > 0
    for found, form in zip(by_autograd, closed, strict=True):
        assert torch.allclose(found, form / value, rtol=1e-9, atol=1e-12)
    assert max(float(gradient.abs().max()) for gradient in by_autograd) > 0


def test_the_gradient_at_zero_is_zero_and_not_nan() -> None:
    net = bypass_fx.extend(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    bypass_fx.penalty(net).backward()
    assert all(bool((parameter.grad == 0).all()) for parameter in net.parameters() if parameter.grad is not None)


def test_the_penalty_is_the_sum_over_the_sites_still_out() -> None:
    net = extended(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)))
    norms = bypass_fx.norms(net)
    assert torch.allclose(bypass_fx.penalty(net).detach(), torch.stack(list(norms.values())).sum())
    assert torch.allclose(bypass_fx.penalty(net, out=["3"]).detach(), norms["3"])
    assert float(bypass_fx.penalty(net, out=[])) == 0.0
    with pytest.raises(bypass_fx.SurgeryError, match="no site is called '4': the sites are 1, 3"):
        bypass_fx.penalty(net, out=["3", "4"])
    assert not any(value.requires_grad for value in norms.values())


def test_the_residual_is_linear_in_d() -> None:
    net = extended(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    before = bypass_fx.norms(net)["1"]
    with torch.no_grad():
        delta_of(net, bypass_fx.sites(net)[0]).mul_(0.25)
    assert torch.allclose(bypass_fx.norms(net)["1"], before * 0.25)
