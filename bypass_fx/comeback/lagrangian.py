"""The augmented-Lagrangian return: multipliers on the entries of A D W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx.constraint import cells, residual_entries
from bypass_fx.extension import sites
from bypass_fx.passes.matrices import tensor_named
from bypass_fx.passes.plan import Site
from bypass_fx.surgery import fold_down

from .base import Moment
from .paths import Descent
from .planned import Planned

_RISE = 0.5  # the part of the way to the landing over which μ rises
_PER_ROUND = 10  # steps that the optimiser gets for each whole step of the multipliers


class AugmentedLagrangian(Planned):
    """The loss becomes L₂ + Σ ⟨Λ, R⟩ + μ/2 ‖R‖² with R = A D W, A D [W b_W] or D, and Λ ← Λ + μR/10 after each step.

    Smooth where the norm of eq. 17 has its kink, so that a fixed learning rate need not step over the constraint; Λ
    tends to the loss's own pull on R, so that μ need not grow without bound. μ rises to 1/(λ'L), beyond which gradient
    descent on the penalty itself might diverge; L bounds the curvature of ‖R‖²/2.
    A, D and W move together towards ADW = 0 with D ≠ 0. What R is left when the landing begins is led to exactly 0: D ←
    cD with b_A ← b_A + (1 − c) A D b_W, the projection of eq. 15 in small steps, which moves A's output by at most
    (1 − c) ‖R‖‖u‖, u being W's input: where ADW = 0 it changes nothing. Ends at D = 0, always, when the budget does;
    strict sites that arrive within ε before that do so with D ≠ 0. Λ has the size of A D W, site by site.

    Args:
        landing: the part of the budget that the landing takes.

    Raises:
        BypassError: the landing is no part of the budget.
    """

    name = "lagrangian"

    def __init__(self, landing: float = 0.25) -> None:
        super().__init__(Descent(share=landing))
        self._multipliers: dict[str, Tensor] = {}
        self._weights = torch.zeros(0)  # μ, [sites]
        self._entries: list[Tensor] = []  # of R of each site, on the way from `norms` to `observe`

    def begin(self, model: nn.Module) -> None:
        with torch.no_grad():
            self._multipliers = {site.name: torch.zeros_like(residual_entries(model, site)) for site in sites(model)}
        first = next(iter(self._multipliers.values()))
        self._weights = torch.zeros(len(self._multipliers), dtype=first.dtype, device=first.device)

    def penalty(self, model: nn.Module, out: frozenset[str], gamma: Tensor) -> Tensor | None:
        terms = []
        for site, half in zip(sites(model), (self._weights / 2).unbind(), strict=True):
            if torch.compiler.is_compiling() or site.name in out:  # Λ and μ of a site that arrived are 0
                r = residual_entries(model, site)
                pull = torch.addcmul(self._multipliers[site.name], r, half.to(r.device))  # Λ + μ/2 R
                terms.append(torch.dot(r, pull).to(gamma.device))
        return torch.stack(terms).sum() if terms else None

    def norms(self, model: nn.Module) -> list[Tensor]:
        self._entries = [residual_entries(model, site) for site in sites(model)]
        return [torch.linalg.vector_norm(entries) for entries in self._entries]

    def observe(self, model: nn.Module, now: Moment) -> None:
        entries, self._entries = self._entries, []
        walk = now.budget * (1 - self._descent.share)
        landing = now.t + 1 >= walk
        shares = (self._weights / _PER_ROUND).unbind()
        bounds = []
        for index, site in enumerate(sites(model)):
            multiplier = self._multipliers[site.name]
            if now.last and site.name not in now.last:  # it has arrived
                multiplier.zero_()
                self._weights[index].zero_()
                bounds.append(self._weights.new_zeros(()))
            elif not landing:
                r = entries[index] if entries else residual_entries(model, site)
                multiplier.addcmul_(r, shares[index].to(r.device))
                bounds.append(curvature(model, site).to(self._weights))
        if not landing:
            stiffest = now.lr * torch.stack(bounds)
            rise = min(1.0, (now.t + 1) / (_RISE * walk))
            self._weights.copy_(torch.where(stiffest > 0, rise / stiffest, torch.zeros_like(stiffest)))

    def shrink(self, now: Moment) -> Tensor | None:
        begun = self._descent.factor(now.t, now.budget) != 1
        return super().shrink(now) if begun else None  # before the landing nothing is folded

    def scale(self, model: nn.Module, site: Site, factor: Tensor) -> None:
        fold_down(model, site, factor)

    def state_dict(self) -> dict[str, Any]:
        return {"multipliers": {k: v.clone() for k, v in self._multipliers.items()}, "weights": self._weights.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, multiplier in state["multipliers"].items():
            self._multipliers[name].copy_(multiplier)
        self._weights.copy_(state["weights"])


def curvature(model: nn.Module, site: Site) -> Tensor:
    """A bound on the largest eigenvalue of JᵀJ, J being the derivative of the site's residual by A, D and W; 0-dim.

    ‖DW‖² + ‖AD‖² + Σᵢ ‖aᵢ‖²‖wᵢ‖² in Frobenius norms, in the cell where it is largest; 1 where the residual is D.
    """
    if site.constraint == "zero":
        return tensor_named(model, site.parameter).new_ones(())
    a, d, w = cells(model, site)
    by_column, by_row = (torch.linalg.vector_norm(each, dim=dim).square() for each, dim in ((a, 1), (w, 2)))
    bound: Tensor = torch.addcmul(by_column * by_row, d.square(), by_row + by_column).sum(1).amax()
    return bound
