"""A small model, its optimiser and a schedule for them, for the tests of the schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx import surgery
from bypass_fx.schedule import BypassSchedule

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(32, 2, generator=torch.Generator().manual_seed(2))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-2)


def begin(opt1: int = 3, opt2: int = 5, **arguments: Any) -> tuple[nn.Module, torch.optim.Optimizer, BypassSchedule]:
    model = mlp()
    optimizer = adam(model)
    return model, optimizer, BypassSchedule(model, optimizer, opt1, opt2, **arguments)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: BypassSchedule) -> Tensor:
    batch = torch.arange(schedule.steps, schedule.steps + 16) % 32
    loss = nn.functional.mse_loss(model(X[batch]), Y[batch]) + schedule.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    return loss.detach()


def until_done(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: BypassSchedule) -> None:
    while schedule.phase != "done":
        train_step(model, optimizer, schedule)


def deltas(model: nn.Module) -> list[nn.Parameter]:
    return [surgery.delta_of(model, site) for site in surgery.sites(model)]
