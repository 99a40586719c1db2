"""What may stand between W and σ, and between σ and A: where the channels go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of


class Tokens(nn.Module):
    """A convolution over a map, a GELU and a Linear on its tokens, and how the map becomes tokens."""

    def __init__(self, tokens: Callable[[Tensor], Tensor], first: bool, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.depthwise, self.fc = nn.Conv2d(4, channels, 3, padding=1, groups=4), nn.Linear(8, 3)
        self.tokens, self.first = tokens, first

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(x)
        h = F.gelu(self.tokens(h)) if self.first else self.tokens(F.gelu(h))
        return self.fc(h)  # type: ignore[no-any-return]


TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "from the front": lambda h: h.flatten(2).transpose(1, 2),
    "by functions": lambda h: torch.transpose(torch.flatten(h, 2), 2, 1),
    "from the end": lambda h: h.flatten(2).transpose(-1, -2),
    "both from the end": lambda h: h.flatten(-2).transpose(-2, -1),
    "both ways": lambda h: h.flatten(2).transpose(1, -1),
    "permuted": lambda h: h.flatten(2).permute(0, 2, 1),
    "of columns first": lambda h: h.transpose(2, 3).flatten(2).transpose(1, 2),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", TOKENS)
def test_the_positions_of_a_map_may_become_one_axis(name: str, first: bool) -> None:
    model, x = Tokens(TOKENS[name], first).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    before = model(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    assert (site.constraint, site.exact, site.channel_dim) == ("folded", "always", -1 if first else -3)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model.depthwise.weight.zero_()
        delta_of(model, site).copy_(torch.randn(8))
    away = model(x)
    bypass_fx.contract(model)
    assert torch.allclose(model(x), away, rtol=0, atol=1e-12)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows alone": lambda h: h.flatten(2, 3)[:, :, :8],
    "channels with rows": lambda h: h.flatten(1, 2).transpose(1, 2)[..., :8],
    "the batch with the channels": lambda h: h.flatten(0, 1).flatten(1)[:, :8],
    "channels that stay in front": lambda h: h.flatten(2),
    "a transpose of channels and rows": lambda h: h.transpose(1, 2).flatten(2).transpose(1, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_where_a_linear_reads_something_else_than_the_channels_there_is_no_strict_site(name: str) -> None:
    plan = bypass_fx.plan(Tokens(OTHERS[name], first=True), mode="strict")
    assert not plan.sites and len(plan.refusals) == 1
