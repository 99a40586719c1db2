"""The generators of random numbers are as they were, wherever a model is planned."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bypass_fx
from bypass_fx.passes.dice import unrolled


def test_a_model_is_planned_under_fake_tensors() -> None:
    """Where nothing holds numbers, the state of the generators is still theirs."""
    before = torch.get_rng_state()
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        bypass_fx.extend(model)
        model(torch.empty(3, 4)).sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        bypass_fx.contract(model)
    assert torch.equal(torch.get_rng_state(), before)


def drawing(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(batch).square().mean() * (1 + random.random() + np.random.rand() + torch.rand(()))
    return loss


@pytest.mark.parametrize("look", [bypass_fx.probe, bypass_fx.stuck])
def test_what_a_loss_draws_while_it_is_looked_at_is_drawn_again(look: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with unrolled([]):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        expected = random.random(), np.random.rand(), float(torch.rand(()))
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)
        look(model, drawing, [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))], mode="all")
        assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
