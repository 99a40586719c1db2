"""The paper's experiments as data: what is trained, for how long, and what each arm does otherwise."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, Optimizer

import bypass_fx
from benchmarks.comeback import TASKS
from bypass_fx import data as datasets
from bypass_fx import models
from bypass_fx.feed import Feed
from bypass_fx.passes.plan import Mode

BASELINE = "baseline"
OPTIMIZERS: Mapping[str, Any] = {"sgd": SGD, "adam": Adam}


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment; lengths in epochs, `shorten` divides them and multiplies the slopes of γ (see experiments.toml)."""

    name: str
    title: str
    data: str
    model: str
    mode: Mode
    optimizer: str
    lr: float
    decay: float
    batch: int
    epsilon: float
    gamma: tuple[float, ...]
    train1: float
    opt1: float
    opt2: float
    train3: float
    seeds: int
    one_start: bool
    at_once: int
    figures: tuple[str, ...]
    arms: Mapping[str, Mapping[str, Any]]
    breaks: tuple[float, ...] = ()
    shorten: float = 1.0
    extends: str = ""
    full: bool = True
    short: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> str:
        """Whether it is as long as the paper's, in a word."""
        return "full" if self.full else "short"

    def arm(self, name: str) -> Experiment:
        """The experiment as this arm has it."""
        return replace(self, **self.arms[name])

    def examples(self) -> datasets.Data:
        """The data."""
        return datasets.load(self.data)

    def feed(self, examples: datasets.Data, seed: int) -> Feed:
        """Minibatches, in an order of this seed's."""
        return Feed(examples.train, self.batch, seed)

    def build(self, examples: datasets.Data) -> nn.Module:
        """A model with new weights."""
        assert examples.shape is not None and examples.outputs is not None
        return models.build(self.model, models.Fit(examples.shape, examples.outputs))

    def optimizer_of(self, model: nn.Module) -> Optimizer:
        """The optimiser of a model; its decay is that of the loss, as the paper has it."""
        made: Optimizer = OPTIMIZERS[self.optimizer](model.parameters(), self.lr, weight_decay=self.decay)
        return made

    def steps(self, epochs: float, per_epoch: int) -> int:
        """A length in steps."""
        return max(1, round(epochs * per_epoch / self.shorten)) if epochs else 0

    def total(self, per_epoch: int) -> int:
        """Steps after θ*."""
        return sum(self.steps(epochs, per_epoch) for epochs in (self.opt1, self.opt2, self.train3))

    def growth(self, per_epoch: int) -> bypass_fx.PiecewiseLinear:
        """γ(t), t in steps."""
        slopes = [slope * self.shorten for slope in self.gamma]
        return bypass_fx.PiecewiseLinear(slopes, [self.steps(at, per_epoch) for at in self.breaks])

    def schedule(self, model: nn.Module, optimizer: Optimizer, per_epoch: int) -> bypass_fx.BypassSchedule:
        """The paper's Algorithm 1 on this model, which is extended here."""
        return bypass_fx.BypassSchedule(
            model, optimizer, self.steps(self.opt1, per_epoch), self.steps(self.opt2, per_epoch),
            gamma=self.growth(per_epoch), epsilon=self.epsilon, comeback="published", mode=self.mode, snapshot=None,
        )  # fmt: skip


def load(full: bool = False, cifar10: str = "") -> dict[str, Experiment]:
    """All experiments by name, as long as the paper's or shortened; on CIFAR-10 where its folder is given."""
    tables = tomllib.loads(Path(__file__).with_name("experiments.toml").read_text())
    found = {}
    for name, own in tables.items():
        table = {**tables.get(own.get("extends", ""), {}), **own}
        short = {} if full else table.get("short", {})
        if cifar10 and table["data"] == "digits":
            table["data"] = f"cifar10:{cifar10}"
        for key in ("gamma", "breaks", "figures"):
            table[key] = tuple(table.get(key, ()))
        found[name] = Experiment(name=name, full=full or not short, **{**table, **short})
    return found


def related(experiment: Experiment) -> tuple[str, ...]:
    """The experiments that its arms come from: where it only varies another one, that first."""
    return (experiment.name,) if "bypass" in experiment.arms else (experiment.extends, experiment.name)


def eggholder_net() -> nn.Module:
    """Three layers of 10 nodes, the ReLU in the second hidden one (Sec. V-A)."""
    return TASKS["eggholder"].net()
