"""Attention behind branches: a site where its values go one way for every answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of
from tests.branching import equal


class ByLength(nn.Module):
    """Attention that branches on sizes, as functions around scaled_dot_product_attention do."""

    def __init__(self, variety: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.variety = variety
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q, self.k, self.v))
        causal = q.shape[2] > 1 and self.variety != "full"
        if k.shape[2] > q.shape[2]:
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        if self.variety == "swaps" and q.shape[2] == 1:
            v = v.flip(-1)
        if self.variety == "swaps below" and q.shape[2] == 1 and q.shape[0] == 3:
            v = v.flip(-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out = out.transpose(1, 2)
        return self.o(out.reshape(*x.shape[:-1], -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("variety", ["", "full"])
def test_attention_behind_branches_on_sizes_is_a_site(variety: str) -> None:
    model = ByLength(variety).double()
    inputs = [torch.randn(2, length, 8).double() for length in (1, 2, 5)]
    expected = [model(x) for x in inputs]
    bypass_fx.extend(model)
    (site,) = bypass_fx.sites(model)
    assert (site.activation, site.constraint, site.view) == ("attention", "folded", (2, 1, 4))
    assert all(equal(model(x), y) for x, y in zip(inputs, expected, strict=True))
    delta = delta_of(model, site)
    with torch.no_grad():  # A D W = 0 with D ≠ 0
        delta.normal_()
        model.v.weight.zero_()
        model.v.bias.normal_()
    before = [model(x) for x in inputs]
    bypass_fx.contract(model)
    for x, y in zip(inputs, before, strict=True):
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("variety", ["swaps", "swaps below"])
def test_attention_whose_values_go_another_way_in_one_branch_is_refused(variety: str) -> None:
    (refusal,) = bypass_fx.plan(ByLength(variety)).refusals
    assert "another way in one branch" in refusal.reason


class Grouped(ByLength):
    """Two queries to a head of keys and values; one query alone is mixed in another layout, as sdpa wrappers do."""

    def __init__(self, variety: str = "") -> None:
        super().__init__(variety)
        self.k, self.v = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, 2)).transpose(1, 2) for each in (self.q, self.k, self.v))
        length, options = q.shape[2], dict[str, Any]()
        if mask is None and k.shape[-1] == v.shape[-1] <= 256:
            options["enable_gqa"] = True
        elif length == 1:
            q = q.reshape(len(x) if self.variety else q.shape[0], 2, 2, 2)
        else:
            k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        out = out.reshape(out.shape[0], -1, length, v.shape[-1])
        return self.o(out.transpose(1, 2).reshape(*x.shape[:-1], -1))  # type: ignore[no-any-return]


def test_heads_of_values_that_several_queries_share() -> None:
    model, x = Grouped().double(), torch.randn(2, 5, 8).double()
    mask = torch.zeros(5, 5).double()
    expected = model(x)
    torch.testing.assert_close(model(x, mask), expected)
    bypass_fx.extend(model)
    (site,) = bypass_fx.sites(model)
    assert site.view == (4, 1, 2) and site.first is not None
    assert site.first.part == ((0, 2), (0, 4), (2, 4))
    assert equal(model(x), expected)
    assert equal(model(x[:, :1]), Grouped().double()(x[:, :1]))
    delta = delta_of(model, site)
    with torch.no_grad():
        delta.normal_()
        v = model.v(x).unflatten(-1, (2, 2)).transpose(1, 2).repeat_interleave(2, 1) * delta.view(4, 1, 2)
    torch.testing.assert_close(model(x), expected + F.linear(v.transpose(1, 2).flatten(2), model.o.weight))
    torch.testing.assert_close(model(x, mask), model(x))
    with pytest.raises(bypass_fx.BypassError, match="as many queries as values"):
        model(x[:, :1], mask[:1, :1])
    with torch.no_grad():
        model.v.weight.zero_()
    before = model(x)
    bypass_fx.contract(model)
    torch.testing.assert_close(model(x), before)
