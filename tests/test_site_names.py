"""Every site has a name of its own."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.trace import Tracing


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


class Unrolled(nn.Module):
    """A loop of many steps, and an activation that is a function and a module of one name."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.relu(torch.relu(x)))
        for _ in range(20_000):
            x = x + 1
        return self.relu(x)  # type: ignore[no-any-return]


def test_the_calls_of_a_long_loop_get_their_names_in_time() -> None:
    owned = Tracing(Unrolled()).trace("")
    start = time.perf_counter()
    names = [*owned.names]
    assert time.perf_counter() - start < 2  # looking for a free name from 1 on takes ten times as long
    assert names[:4] == ["relu_1", "relu", "relu_2", "add"] and names[-2:] == ["add_19999", "relu_3"]
