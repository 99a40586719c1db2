"""What a rule answers about an activation call: a match, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import Affine, Constraint, Exact, Kind

if TYPE_CHECKING:
    from .channels import Channels


@dataclass(frozen=True, slots=True)
class Match:
    """What a rule found for a call."""

    kind: Kind
    constraint: Constraint
    channels: Channels
    first: Affine | None = None
    second: Affine | None = None
    exact: Exact = "always"
    view: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a rule does not take a call, and what the user can do about it."""

    text: str
    remedy: str = ""


LEAVES = Reason("its result leaves the code that can be seen")
SPLIT = "split the forward so that the activation is a module of its own, e.g. torch.nn.ReLU()"
