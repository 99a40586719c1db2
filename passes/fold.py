"""Folding: what a site's D leaves behind when it is taken out, b_A ← b_A + A D b_W (eq. 15 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .matrices import offset, placed_like, respond, whole
from .plan import Site


def in_fold_order(sites: Iterable[Site]) -> list[Site]:
    """The sites in an order in which a bias is complete before it is read: one site's A may be another's W."""
    todo = list(sites)
    ordered: list[Site] = []
    while todo:
        written = {site.second.bias for site in todo if site.second is not None and site.second.bias}
        ready = [site for site in todo if site.first is None or site.first.bias not in written] or todo[:1]
        ordered += ready
        todo = [site for site in todo if site not in ready]
    return ordered


def bias_shift(model: nn.Module, site: Site, delta: Tensor) -> Tensor | None:
    """A D b_W, the translation that proj adds to b_A (eq. 25), shape (outputs,); None where nothing is folded."""
    if site.constraint != "folded" or site.first is None or site.second is None or site.second.bias is None:
        return None
    b = offset(model, site.first)
    return None if b is None else respond(model, site.second, delta.to(torch.promote_types(b.dtype, delta.dtype)) * b)


@torch.no_grad()
def fold(model: nn.Module, site: Site, delta: Tensor) -> Tensor | None:
    """Add A D b_W to b_A in place, and return it."""
    shift = bias_shift(model, site, delta)
    if shift is not None and site.second is not None and site.second.bias is not None:
        bias = model.get_parameter(site.second.bias)
        bias.copy_(placed_like(bias, whole(bias).to(shift.dtype) + shift))
    return shift
