"""When a site has arrived: ε for each site, or for all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from bypass_fx.numeric import is_above
from bypass_fx.passes.errors import BypassError


@dataclass(frozen=True, slots=True)
class Total:
    """An ε on the sum of the norms: the sites arrive together, when the sum over those still out is below.

    Raises:
        BypassError: the number is not positive.
    """

    epsilon: float

    def __post_init__(self) -> None:
        _expect_positive(self.epsilon)


Epsilon = float | Mapping[str, float] | Total


def check(epsilon: Epsilon) -> None:
    """Check an ε as the user gave it.

    Raises:
        BypassError: a number is not positive.
    """
    if not isinstance(epsilon, Total):
        for number in epsilon.values() if isinstance(epsilon, Mapping) else (epsilon,):
            _expect_positive(number)


class Threshold:
    """An ε as it holds for the sites of one model.

    Args:
        epsilon: one number for every site, a number for each pattern of names (the first that fits), or a `Total`.
        names: the sites.
        like: a tensor of the device and dtype that norms will have.

    Raises:
        BypassError: no pattern of a mapping fits a site.

    Example:
        >>> threshold = Threshold({"head.*": 1e-2, "*": 1e-4}, ["head.act", "stem.act"], like=torch.zeros(()))
        >>> threshold.within(torch.tensor([1e-3, 1e-3]))
        tensor([ True, False])
        >>> threshold.arrived({"head.act": 1e-3, "stem.act": 1e-3}, out=frozenset({"head.act", "stem.act"}))
        ['head.act']
    """

    def __init__(self, epsilon: Epsilon, names: Sequence[str], like: Tensor) -> None:
        self._total = epsilon.epsilon if isinstance(epsilon, Total) else None
        if isinstance(epsilon, Total):
            self._each = dict.fromkeys(names, epsilon.epsilon)
        else:
            patterns = epsilon if isinstance(epsilon, Mapping) else {"*": epsilon}
            self._each = {name: _first_fit(patterns, name) for name in names}
        self.key = self._total, *self._each.values()  # what tells two thresholds of the same sites apart
        self._on_device = torch.tensor([*self._each.values()], dtype=like.dtype, device=like.device)

    def within(self, norms: Tensor) -> Tensor:
        """Which sites are near enough, […, sites] to the same; sites that have arrived have the norm 0."""
        return (norms if self._total is None else norms.sum(-1, keepdim=True).expand_as(norms)) < self._on_device

    def arrived(self, norms: Mapping[str, float], out: frozenset[str]) -> list[str]:
        """Those of the sites still out that are near enough, in order, by norms on the host."""
        total = sum(norms[name] for name in out)
        far = {name: norms[name] if self._total is None else total for name in out}
        return [name for name, epsilon in self._each.items() if name in out and far[name] < epsilon]


def _first_fit(patterns: Mapping[str, float], name: str) -> float:
    for pattern, number in patterns.items():
        if fnmatchcase(name, pattern):
            return number
    raise BypassError(f"epsilon has no entry that fits the site {name!r}; add one for '*'")


def _expect_positive(epsilon: float) -> None:
    if not is_above(epsilon, 0):
        raise BypassError(f"epsilon is {epsilon!r}; give a positive number, such as 1e-4")
