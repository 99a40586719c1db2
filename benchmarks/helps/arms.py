"""The arms: what is done after θ*, plain or with a bypass, and what each of its steps costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import bypass_fx
from bypass_fx.accept import Accept

Evaluate = Callable[[nn.Module], Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """What an arm does in the steps after θ*.

    Attributes:
        name: for the tables.
        family: "plain" or "bypass".
        rate: the learning rate's course, "decay", "restarts" or "cosine".
        noise: standard deviation of what is added to the weights, in those of each tensor; at `kicks` moments.
        kicks: how many; the first at θ*, the others evenly over the part of the steps in which others bypass.
        sam: ρ of sharpness-aware minimisation, 0 for none.
        comeback: the return, "" for none.
        walk, back: the shares of all steps that opt1 and opt2 take, over all cycles.
        cycles, rest: bypasses in a row, and the share of all steps between them, over all.
        delta_lr: D's learning rate over that of the weights.
        gamma: γ at the end of opt2, for the returns that have one; it grows in proportion to t.
        epsilon: when a site has arrived.
        mode, select: the sites; "stuck" and "probe" measure them at θ*.
        accept: "" keeps every outcome, "not-worse" and "forecast" judge it.
    """

    name: str
    family: str
    rate: str = "decay"
    noise: float = 0.0
    kicks: int = 1
    sam: float = 0.0
    comeback: str = ""
    walk: float = 1 / 6
    back: float = 1 / 3
    cycles: int = 1
    rest: float = 0.0
    delta_lr: float = 1.0
    gamma: float = 1.0
    epsilon: float = 1e-4
    mode: str = "auto"
    select: str = ""
    accept: str = ""

    @property
    def takes_longer(self) -> bool:
        """Whether its steps take longer than those of plain training."""
        return bool(self.sam or self.comeback)

    def factor(self, step: int, steps: int, decay: float) -> float:
        """The learning rate at a step over that before θ*.

        "decay" is 1 and falls as a half cosine over the last share `decay` of the steps; "restarts" are three half
        cosines, each from 2, and "cosine" is one from 1.
        """
        if self.rate == "cosine":
            decay = 1.0
        if self.rate == "restarts":
            return 1 + math.cos(math.pi * (3 * step / steps % 1.0))
        left = (steps - step) / (decay * steps)
        return 1.0 if left >= 1 else (1 - math.cos(math.pi * left)) / 2

    def kick_steps(self, steps: int, decay: float) -> list[int]:
        """The steps before which noise is added."""
        return [round(kick * (1 - decay) * steps / self.kicks) for kick in range(self.kicks)] if self.noise else []

    def schedule(
        self, model: nn.Module, optimizer: Optimizer, steps: int, evaluate: Evaluate, losses: Sequence[float],
        every: int, measuring: dict[str, dict[str, Any]],
    ) -> bypass_fx.BypassSchedule:  # fmt: skip
        """The bypass from θ* on.

        Args:
            model, optimizer: at θ*.
            steps: how many there are after θ*.
            evaluate: the training loss of a model.
            losses, every: what it was before θ*, and how many steps apart.
            measuring: what `select="stuck"` and `select="probe"` need beside.
        """
        opt1, opt2, rest = (round(share * steps / self.cycles) for share in (self.walk, self.back, self.rest))
        accept: Accept | None = None
        if self.accept == "not-worse":
            accept = bypass_fx.NotWorse(evaluate, after=rest)
        elif self.accept == "forecast":
            accept = bypass_fx.BeatsForecast(evaluate, losses, every, after=rest)
        as_plan: dict[str, Any] = {"mode": self.mode}
        if self.select:
            as_plan |= {"select": self.select, **measuring.get(self.select, {})}
        return bypass_fx.BypassSchedule(
            model, optimizer, opt1, opt2, gamma=bypass_fx.Linear(self.gamma / max(1, opt2)), epsilon=self.epsilon,
            comeback=self.comeback, delta_lr=self.delta_lr * optimizer.param_groups[0]["initial_lr"], accept=accept,
            snapshot="cpu" if accept else None, cycles=self.cycles, rest=rest, **as_plan,
        )  # fmt: skip


def kick(values: torch.Tensor, sizes: Sequence[int], noise: float, seed: int) -> None:
    """Add noise to the parameters of one model, [parameters], with `noise` times each tensor's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(values), generator=generator)
    for part, each in zip(*(torch.split(flat, [*sizes]) for flat in (values, drawn)), strict=True):
        spread = part.std() if part.numel() > 1 else part.abs().mean()
        part.add_(noise * spread * each)
