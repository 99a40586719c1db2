"""The generators of random numbers are as they were, wherever a model is planned."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bypass_fx


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
