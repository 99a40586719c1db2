"""Models whose forward has no graph, with attentions below it that are not called as their defaults say."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of

Pair = tuple[Tensor, Tensor]


class Cache:
    """Values of earlier calls."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def update(self, value: Tensor) -> Tensor:
        self.values.append(value)
        return value


class Attention(nn.Module):
    """One head, with the options that the attentions of libraries have; its output projection may stand outside."""

    def __init__(self, projects: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8) if projects else None

    def forward(self, x: Tensor, pair: Pair, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        cos, sin = pair
        weights = (self.q(x) * cos) @ (self.k(x) * sin).transpose(-2, -1)
        if mask is not None:
            weights = weights + mask
        v = self.v(x) if cache is None else cache.update(self.v(x))
        mixed = weights.softmax(-1) @ v
        return mixed if self.out is None else self.out(mixed)


class Layer(nn.Module):
    """Its defaults are no call that runs: there is no pair in them."""

    def __init__(self, projects: bool = True) -> None:
        super().__init__()
        self.attention, self.norm = Attention(projects), nn.LayerNorm(8)
        self.output = None if projects else nn.Linear(8, 8)

    def forward(
        self, x: Tensor, pair: Pair | None = None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        mixed = self.attention(self.norm(x), pair=pair, mask=mask, cache=cache)
        mixed = mixed if self.output is None else self.output(mixed)
        result: Tensor = x + mixed
        return result


class Model(nn.Module):
    """Its forward has no graph."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layers or (Layer(), Layer()))
        self.head = nn.Linear(8, 1)
        self.runs = 0

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        self.runs += 1
        with contextlib.nullcontext():
            for layer in self.layers:
                x = layer(x, pair=(x.cos(), x.sin()), mask=mask, cache=cache)
        result: Tensor = self.head(x)
        return result


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
BOTH = ["layers.0.attention.matmul_1", "layers.1.attention.matmul_1"]


def attentions(plan: bypass_fx.Plan) -> list[str]:
    return [site.name for site in plan if site.activation == "attention"]


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for site in bypass_fx.sites(model):
            delta_of(model, site).fill_(value)
