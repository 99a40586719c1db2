"""What losses of arms say: the best plain arm, ratios, their geometric mean with a bootstrap interval, wins and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean

import torch

TIE = 0.001
FLOOR = 1e-7  # losses below are rounding in float32
DRAWS = 10_000


def best_plain(losses: Mapping[str, Sequence[float]]) -> str:
    """The arm with the lowest geometric mean of the final training losses over the seeds.

    Example:
        >>> best_plain({"continue": [1.0, 4.0], "noise": [1.0, 1.0]})
        'noise'
    """
    return min(losses, key=lambda arm: fmean(log(max(loss, FLOOR)) for loss in losses[arm]))


def ratios(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Loss over loss, seed by seed.

    Example:
        >>> ratios([1.0, 0.0], [2.0, 1e-9])
        [0.5, 1.0]
    """
    return [max(a, FLOOR) / max(b, FLOOR) for a, b in zip(losses, reference, strict=True)]


@dataclass(frozen=True, slots=True)
class Tally:
    """Shares of the seeds whose ratio is below 1 by more than `TIE`, within it, and above."""

    wins: float
    ties: float
    losses: float


def tally(values: Sequence[float]) -> Tally:
    """Count them.

    Example:
        >>> tally([0.5, 0.9995, 1.0, 1.2])
        Tally(wins=0.25, ties=0.5, losses=0.25)
    """
    wins, losses = (sum(value < 1 - TIE for value in values), sum(value > 1 + TIE for value in values))
    return Tally(wins / len(values), (len(values) - wins - losses) / len(values), losses / len(values))


def geometric_mean(by_task: Sequence[Sequence[float]]) -> float:
    """Over the seeds of each task, then over the tasks: each task counts the same.

    Example:
        >>> geometric_mean([[0.5, 2.0, 1.0], [0.25]])
        0.5
    """
    return exp(fmean(fmean(log(value) for value in values) for values in by_task))


def bootstrap(by_task: Sequence[Sequence[float]], draws: int = DRAWS, level: float = 0.95) -> tuple[float, float]:
    """An interval for `geometric_mean`: percentiles over draws of as many seeds, with replacement, within each task.

    Example:
        >>> low, high = bootstrap([[0.5, 1.0, 0.8, 0.7]])
        >>> 0.5 < low < 0.73 < high < 1.0
        True
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(draws, dtype=torch.float64)
    for values in by_task:
        logs = torch.tensor(values, dtype=torch.float64).log()
        chosen = torch.randint(len(logs), (draws, len(logs)), generator=generator)
        total += logs[chosen].mean(1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (total / len(by_task)).exp().quantile(tails).tolist()
    return low, high
