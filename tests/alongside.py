"""Models that train together, beside the same ones that train alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx.replicas import Replicas
from bypass_fx.schedule import BypassSchedule

COUNT = 4
Make = Callable[[], nn.Module]
Optimise = Callable[[Any], Optimizer]
Begin = Callable[[int, nn.Module, Optimizer], BypassSchedule | None]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.GELU(),
        nn.Linear(8, 2),
    )  # fmt: skip


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, 0.05)


def adam(parameters: Any) -> Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def batch_at(step: int, row: int, shape: tuple[int, ...] = (6,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + row)
    x = torch.randn(16, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(16, 2, generator=generator, dtype=torch.float64)


def batches_at(step: int, shape: tuple[int, ...] = (6,)) -> tuple[Tensor, Tensor]:
    x, y = zip(*(batch_at(step, row, shape) for row in range(COUNT)), strict=True)
    return torch.stack(x), torch.stack(y)


def seeds(make: Make = mlp) -> list[nn.Module]:
    models = []
    for seed in range(COUNT):
        torch.manual_seed(seed)
        models.append(make().double())
    return models


class Alone:
    """The same seeds, one after another in ordinary loops."""

    def __init__(self, models: list[nn.Module], optimise: Optimise) -> None:
        self.models = copy.deepcopy(models)
        self.optimizers = [optimise(model.parameters()) for model in self.models]
        self.schedules: list[BypassSchedule | None] = [None] * len(models)

    def lead(self, begin: Begin) -> None:
        pairs = zip(self.models, self.optimizers, strict=True)
        self.schedules = [begin(row, model, optimizer) for row, (model, optimizer) in enumerate(pairs)]

    def step(self, step: int, shape: tuple[int, ...] = (6,)) -> Tensor:
        losses = []
        for row, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            schedule = self.schedules[row]
            loss = loss_fn(model, batch_at(step, row, shape))
            losses.append(loss.detach())
            optimizer.zero_grad()
            (loss + schedule.penalty() if schedule else loss).backward()
            optimizer.step()
            if schedule:
                schedule.step(loss)
        return torch.stack(losses)


def together(models: list[nn.Module], optimise: Optimise, at_once: int | None = None) -> Replicas:
    models = copy.deepcopy(models)
    return Replicas(models, [optimise(model.parameters()) for model in models], at_once)


def lead(replicas: Replicas, alone: Alone, begin: Begin) -> None:
    rows = iter(range(COUNT))
    replicas.lead(lambda model, optimizer: begin(next(rows), model, optimizer))
    alone.lead(begin)


def expect_same(replicas: Replicas, alone: Alone, steps: range, shape: tuple[int, ...] = (6,)) -> list[tuple[str, ...]]:
    """Step both, compare losses, weights, buffers and phases at each step; the phases that were met."""
    met = []
    for step in steps:
        losses = replicas.backward(loss_fn, batches_at(step, shape))
        replicas.step(losses)
        torch.testing.assert_close(losses, alone.step(step, shape))
        for own, other in zip(replicas.models, alone.models, strict=True):
            torch.testing.assert_close(own.state_dict(), other.state_dict())
        phases = tuple(schedule.phase if schedule else "" for schedule in replicas.schedules)
        assert phases == tuple(schedule.phase if schedule else "" for schedule in alone.schedules)
        for own_schedule, other_schedule in zip(replicas.schedules, alone.schedules, strict=True):
            if own_schedule and other_schedule:
                assert own_schedule.norms == pytest.approx(other_schedule.norms, abs=1e-12)
        met.append(phases)
    return met


OPTIMISERS: dict[str, Optimise] = {
    "sgd": sgd,
    "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, maximize=True),
    "adam": adam,
    "adam with decay": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
}
