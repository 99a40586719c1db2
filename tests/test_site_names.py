"""Every site has a name of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bypass_fx


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))  # type: ignore[no-any-return]


class Around(nn.Module):
    """Calls a block, and the block's activation on its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.a, self.b = Block(), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.b(self.block.act(self.a(x)))  # type: ignore[no-any-return]


def test_an_activation_that_two_owners_call_is_two_sites_and_both_come_back() -> None:
    net, x = Around(), torch.randn(8, 4)
    assert {site.name: site.owner for site in bypass_fx.plan(net)} == {"block.act": "block", "block.act_1": ""}
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    schedule = bypass_fx.BypassSchedule(net, optimizer, opt1=3, opt2=6)
    while schedule.phase != "done":
        (net(x).square().mean() + schedule.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert {arrival.site for arrival in schedule.reports[0].arrivals} == {"block.act", "block.act_1"}
