"""Runs on example inputs leave a model, and all that it draws from, as they were."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bypass_fx.accept import NotWorse
from bypass_fx.passes.link import Linked
from bypass_fx.passes.value_shapes import ValueShapes
from tests.untraced import X


class Net(nn.Module):
    """A forward without a graph above a layer, and what a kind of model does besides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.nullcontext():
            result: Tensor = self.layer(self.before(x))
        return result

    def before(self, x: Tensor) -> Tensor:
        return x


class Merging(Net):
    """Merges an update into its weight for eval mode, as layers of low rank do; its `train` returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.update, self.merged = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.ones(8, 8)), False

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.update if mode else self.update
            self.merged = not mode

    def before(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.update)


class Teaching(Net):
    """Holds a mean of its weights, and counts its calls in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
        self._calls = [torch.zeros(())]

    def before(self, x: Tensor) -> Tensor:
        self.teacher.data = self.teacher.data * 0.9 + 0.1
        self.mean.lerp_(torch.ones(8, 8), 0.1)
        self._calls[0].add_(1)
        return x @ self.teacher


class Starting(Net):
    """Sets its scale by the first batch, as layers that normalise a flow do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("started", torch.tensor(False))

    def before(self, x: Tensor) -> Tensor:
        if not self.started:
            self.scale.data.copy_(1 / x.flatten(0, -2).std(0))
            self.started.fill_(True)
        return x * self.scale


class Observing(Net):
    """Holds a range that has no entries before the first batch, as observers for quantisation do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor([]))
        self.register_buffer("high", torch.tensor(0.0))

    def before(self, x: Tensor) -> Tensor:
        self.low.resize_(8).copy_(x.flatten(0, -2).amin(0))
        self.high.fill_(x.max())
        return x


class Drawing(Net):
    """Draws from a generator of its own, from NumPy's, and from Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def before(self, x: Tensor) -> Tensor:
        return x + torch.rand((), generator=self.generator) + np.random.rand() + random.random() + torch.rand(())


@pytest.mark.parametrize("kind", [Net, Merging, Teaching, Starting, Observing, Drawing])
@pytest.mark.parametrize("training", [True, False])
def test_a_run_changes_no_values_and_no_generator(kind: type[Net], training: bool) -> None:
    model = kind()
    model.train(training)
    tensors = [*model.state_dict().values(), *getattr(model, "_calls", [])]
    before = [tensor.clone() for tensor in tensors]
    own = getattr(model, "generator", torch.default_generator)
    dice = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), own.get_state().tolist()
    linked = Linked(model, (X,))
    assert linked.observed is not None and not linked.observed.failure
    assert all(map(torch.equal, [*model.state_dict().values(), *getattr(model, "_calls", [])], before))
    assert all(module.training == training for module in model.modules())
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), own.get_state().tolist()
    assert after == dice


def test_a_look_at_the_shapes_merges_no_weights() -> None:
    model = Merging()
    ValueShapes(Linked(model, (X,)), [], (X,))
    assert not model.weight.any() and model.training


def test_a_condition_looks_at_the_loss_without_merging_weights() -> None:
    model = Merging()
    NotWorse(lambda net: net(X).sum()).begin(model)
    assert not model.weight.any() and not model.merged and model.training
