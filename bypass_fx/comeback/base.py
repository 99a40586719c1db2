"""What a return is: what opt2 adds to the loss, and what it does to each site after an optimiser step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from bypass_fx.constraint import residuals
from bypass_fx.extension import delta_of, sites
from bypass_fx.passes.plan import Site


@dataclass(frozen=True, slots=True)
class Moment:
    """The moment after an optimiser step of opt2, as a return sees it.

    `norms` holds one norm per site, [sites], before any shrinking and 0 where a site has arrived; in steps in which none
    is taken, that of the last with the shrinking since; `t` counts the earlier steps of opt2, of which `budget` are
    planned; `gamma` is γ(t), 0-dim; `lr` is λ', D's learning rate. `last` holds the norms of the sites still out as last
    seen on the host: those after the step before, on a GPU the one before that.
    """

    norms: Tensor
    gamma: Tensor
    t: int
    budget: int
    lr: float | Tensor
    last: Mapping[str, float] = field(default_factory=dict)


class Comeback:
    """A return that does nothing; the base of those that do.

    `penalty` is added to the user's loss. After each optimiser step the schedule calls `observe`, then `shrink`, which
    gives the factor by which each site's residual is scaled, and `scale`, which carries it out: ADW is linear in D, so
    by default D ← cD, and no second evaluation is needed. Enter a new return in `COMEBACKS`.
    """

    name: ClassVar[str]
    uses_gamma: ClassVar[bool] = False
    may_skip: ClassVar[bool] = False  # whether it goes well with norms, and its penalty, in every k-th step only
    every: ClassVar[int] = 1  # k, where nobody says another

    @property
    def penalises(self) -> bool:
        """Whether it adds a penalty to the loss."""
        return type(self).penalty is not Comeback.penalty

    @property
    def ends(self) -> bool:
        """Whether every site has arrived after the budget's last step, whatever the loss."""
        return False

    def begin(self, model: nn.Module) -> None:
        """opt2 begins on this extended model: forget what an earlier bypass left."""

    def moves(self, model: nn.Module) -> tuple[nn.Parameter, ...]:
        """The parameters beside D that `scale` changes or goes by; the optimiser steps them with `pace` as well."""
        return ()

    def penalty(self, model: nn.Module, out: frozenset[str], gamma: Tensor) -> Tensor | None:
        """What is added to the loss while the sites in `out` are out: a differentiable 0-dim tensor, or None."""
        return None

    def alike(self) -> Hashable | None:
        """Where two returns give the same, `penalty` and `shrink` of one hold for the model of the other; None: neither."""
        return None

    def pace(self, t: int, budget: int) -> float:
        """The factor on D's learning rate in step `t` of opt2, beside λ'."""
        return 1.0

    def norms(self, model: nn.Module) -> list[Tensor]:
        """The norm of each site's residual after an optimiser step, 0-dim; `observe` comes next."""
        return residuals(model, sites(model))

    def observe(self, model: nn.Module, now: Moment) -> None:
        """Take note of an optimiser step."""

    def shrink(self, now: Moment) -> Tensor | None:
        """The factor on each site's residual after an optimiser step, [sites]; None where all stay as they are."""
        return None

    def scale(self, model: nn.Module, site: Site, factor: Tensor) -> None:
        """Scale the site's residual by a factor from 0 to 1, a 0-dim tensor."""
        delta = delta_of(model, site)
        delta.mul_(factor.to(delta))

    def notes(self) -> tuple[str, ...]:
        """What the user should know of this return once it is over, for the report."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What this return must remember to go on exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, after `begin`."""
