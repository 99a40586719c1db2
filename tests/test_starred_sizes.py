"""Sizes unpacked with a starred name: `batch, channels, *spatial = x.shape`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import bypass_fx
from bypass_fx.passes.errors import SurgeryError
from bypass_fx.passes.trace import Tracing
from tests.invariants.test_generated import expect_exact_fold


class Tried(nn.Module):
    def __init__(self, body: Callable[[Tried, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.body = nn.Linear(4, 8), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def in_the_middle(s: Tried, x: Tensor) -> Tensor:
    batch, *positions, channels = x.shape
    out: Tensor = s.a(x).view(batch, *positions, 2, channels)
    return out


def at_the_end(s: Tried, x: Tensor) -> Tensor:
    batch, channels, *spatial = x.shape
    return s.a(x.reshape(batch, channels, -1).softmax(-1).reshape(batch, channels, *spatial))


@pytest.mark.parametrize("body", [in_the_middle, at_the_end])
def test_a_starred_name_takes_the_sizes_in_the_middle_or_at_the_end(body: Callable[[Tried, Tensor], Tensor]) -> None:
    own = Tried(body)
    graph = fx.GraphModule(own, Tracing(own).trace("").graph)
    for shape in ((2, 3, 4), (2, 1, 3, 4), (1, 2, 1, 3, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), own(x), rtol=0, atol=0)
    with pytest.raises((SurgeryError, IndexError)):
        graph(torch.randn(4))


class Mixing(nn.Module):
    """Queries, keys and values of two heads, mixed in a module without weights."""

    def forward(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        q, k, v = qkv.reshape(batch * 2, width // 2, length).split(width // 6, dim=1)
        weights = torch.einsum("bct,bcs->bts", q, k).softmax(-1)
        return torch.einsum("bts,bcs->bct", weights, v).reshape(batch, -1, length)


class Block(nn.Module):
    """Attention over the positions of maps with any number of axes, between convolutions of one axis."""

    def __init__(self, starred: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.GroupNorm(2, 8), nn.Conv1d(8, 24, 1), nn.Conv1d(8, 8, 1)
        self.mixing, self.starred = Mixing(), starred

    def forward(self, x: Tensor) -> Tensor:
        if not self.starred:
            return self.proj(self.mixing(self.qkv(self.norm(x.flatten(2))))).reshape(x.shape)  # type: ignore[no-any-return]
        batch, channels, *spatial = x.shape
        x = x.reshape(batch, channels, -1)
        x = x + self.proj(self.mixing(self.qkv(self.norm(x))))
        return x.reshape(batch, channels, *spatial)


@pytest.mark.parametrize("starred", [False, True])
@pytest.mark.parametrize("behind", [True, False])
def test_the_values_of_attention_over_maps_are_followed_through_a_module_without_weights(
    starred: bool, behind: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1) if behind else nn.Identity(), Block(starred))
    x = torch.randn(2, 3 if behind else 8, 4, 5)
    before = model(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    assert (site.name, site.constraint, site.width) == ("1.mixing.einsum_1", "folded", 8)
    assert torch.equal(model(x), before)
    expect_exact_fold(model, site, x)
