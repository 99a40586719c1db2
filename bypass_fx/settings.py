"""The settings of a training run, with the defaults of the main job; torch is not needed to read them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bypass_fx.gamma import Gamma, Linear, PiecewiseLinear
from bypass_fx.nearest import did_you_mean
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import MODES, Mode


class SettingsError(BypassError):
    """A setting is out of range; the message names it and what it may be."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train: the phases train1, opt1, opt2 and train3 in epochs, the optimiser, and the bypass itself.

    `n` is the length of opt1 in steps and stands in for `opt1` where given. `return_lr` is λ', the learning rate in
    opt2; None keeps `lr`. `gamma` is γ(t), see `parse_gamma`; t counts steps or epochs of opt2, as `gamma_unit` says.

    Raises:
        SettingsError: a setting is out of range.

    Example:
        >>> Settings(epsilon=0.0)
        Traceback (most recent call last):
        bypass_fx.settings.SettingsError: epsilon is 0.0; give a number above 0, such as 1e-4
    """

    optimizer: str = "adam"
    lr: float = 4e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 256
    train1: int = 600
    opt1: int = 200
    opt2: int = 400
    train3: int = 300
    n: int | None = None
    comeback: str = "homotopy"
    return_lr: float | None = None
    gamma: str = "0.005"
    gamma_unit: str = "step"
    epsilon: float = 5e-6
    mode: Mode = "auto"
    select: str | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "epsilon", "return_lr"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise SettingsError(f"{name} is {value}; give a number above 0, such as 1e-4")
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise SettingsError(f"{name} is {value}; give a number from 0 up")
        for name in ("batch_size", "train1", "opt1", "opt2", "train3", "n", "seed"):
            value, least = getattr(self, name), 1 if name in ("batch_size", "opt2", "n") else 0
            if value is not None and value < least:
                raise SettingsError(f"{name} is {value}; give a whole number from {least} up")
        if self.seed >= 2**32:
            raise SettingsError(f"seed is {self.seed}; give a whole number below 2**32")
        _expect_choice("mode", self.mode, MODES)
        _expect_choice("gamma_unit", self.gamma_unit, ("step", "epoch"))
        parse_gamma(self.gamma)


def parse_gamma(text: str) -> Gamma:
    """γ(t) from text: a slope, then any number of later slopes with the t from which they hold.

    Raises:
        SettingsError: the text is no such list, or a slope doesn't make γ grow.

    Example:
        >>> parse_gamma("0.005")
        Linear(slope=0.005)
        >>> parse_gamma("3e-6,60:3e-5")
        PiecewiseLinear(slopes=(3e-06, 3e-05), breaks=(60.0,))
    """
    first, *later = text.split(",")
    try:
        pairs = [piece.split(":") for piece in later]
        breaks = tuple(float(start) for start, _ in pairs)
        slopes = (float(first), *(float(slope) for _, slope in pairs))
        return PiecewiseLinear(slopes, breaks) if breaks else Linear(slopes[0])
    except ValueError as error:
        raise SettingsError(f"gamma is {text!r}; write a slope, such as 0.005, or SLOPE,T:SLOPE,...") from error
    except BypassError as error:
        raise SettingsError(f"gamma is {text!r}: {error}") from error


def _expect_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{name} is {value!r}; {did_you_mean(value, choices)} choose from {', '.join(choices)}")
