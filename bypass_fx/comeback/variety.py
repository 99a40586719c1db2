"""The return to the strict variety with D ≠ 0, by moving A or W."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bypass_fx.constraint import cells, groups_cut
from bypass_fx.extension import root_of, sites
from bypass_fx.passes.matrices import offset
from bypass_fx.passes.plan import Affine, Site
from bypass_fx.surgery import fold_down

from .paths import Descent
from .planned import Planned

Side = Literal["A", "W", "D"]


class Variety(Planned):
    """A planned path to A D W = 0 with D ≠ 0, the paper's second escape (eq. 25): A, or W, is led there and D stays.

    With P the projector on the columns of D W, A ← A (I − (1 − c(t+1)/c(t)) P) after each optimiser step scales A D W by
    c(t+1)/c(t), and by 0 in the last: A (I − (DW)(DW)⁺) D W = 0. It needs n > l, the inputs of W (times its taps; one
    more where b_W counts in). Where n > m, the outputs of A (times its taps), W ← (I − (1 − …)(AD)⁺(AD)) W does it too.
    Of the sides that can move, the one that must change less, relative to its norm, is taken when opt2 begins. The
    optimiser moves A, D and W with c(t) times their learning rates, so that the last step cuts off next to nothing.

    Ends at D ≠ 0 where a side can move, always, T steps after its start at the latest; D is then folded in, A D b_W to
    b_A. Ends at D = 0, as a homotopy, at relaxed sites and where neither side can move: n ≤ l and n ≤ m, groups that
    cut through each other, or weights that are frozen, tied, parametrised or those of several sites; the report says
    which. A weight that other calls use too is moved for them as well, as an optimiser would. Costs a singular value
    decomposition of DW, or of AD, at each step and site.

    Args:
        path: c(t), see `Descent`.

    Raises:
        BypassError: the path is unknown.
    """

    name = "variety"

    def __init__(self, path: str = "smooth") -> None:
        super().__init__(Descent(path))
        self._sides: dict[str, Side] = {}
        self._reasons: dict[str, str] = {}

    def begin(self, model: nn.Module) -> None:
        self._sides, self._reasons = {}, {}
        several = _shared(model)
        for site in sites(model):
            reasons = {side: hindrance(model, site, side) or several.get((site.name, side), "") for side in ("A", "W")}
            free: list[Side] = [side for side, reason in reasons.items() if not reason]  # type: ignore[misc]
            self._sides[site.name] = min(free, key=lambda side: change(model, site, side)) if free else "D"
            if not free:
                self._reasons[site.name] = "; ".join(dict.fromkeys(reasons.values()))

    def moves(self, model: nn.Module) -> tuple[nn.Parameter, ...]:
        root = root_of(model)
        names: dict[str, None] = {}
        for site in sites(root):
            if self._sides[site.name] != "D":
                names |= dict.fromkeys(_weights(site, "A") + _weights(site, "W"))
        held = dict(root.named_parameters())
        return tuple(held[name] for name in names if name in held)

    def scale(self, model: nn.Module, site: Site, factor: Tensor) -> None:
        side, root = self._sides[site.name], root_of(model)
        weights = _weights(site, side) if side != "D" else []
        if frozen := [name for name in weights if not root.get_parameter(name).requires_grad]:  # since opt2 began
            self._sides[site.name] = side = "D"
            self._reasons[site.name] = f"{frozen[0]} is frozen"
        if side == "D":
            fold_down(model, site, factor)
        else:
            cut(model, site, side, 1 - factor)

    def notes(self) -> tuple[str, ...]:
        return tuple(f"variety: site {name!r} went to D = 0: {reason}" for name, reason in self._reasons.items())

    def state_dict(self) -> dict[str, Any]:
        return {"sides": dict(self._sides), "reasons": dict(self._reasons)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sides, self._reasons = dict(state["sides"]), dict(state["reasons"])


def hindrance(model: nn.Module, site: Site, side: Side) -> str:
    """Why A, or W, can't be moved so that A D W = 0 while D ≠ 0; "" where it can."""
    if site.first is None or site.second is None or site.constraint == "zero":
        return "the constraint of a relaxed site is D = 0"
    if groups_cut(site):
        return "the groups of W and A cut through each other"
    a, _, w = cells(model, site)
    each, rank = w.shape[1], (w.shape[2] + (site.constraint == "augmented") if side == "A" else a.shape[1])
    if each <= rank:
        of = "inputs of W" if side == "A" else "outputs of A"
        return f"{each} channels, no more than the {rank} {of}"
    if side == "W" and site.first.norm:
        return f"W ends in the BatchNorm {site.first.norm}"
    if side == "W" and any(one[1] > two[0] for one, two in pairwise(sorted(site.first.part))):
        return f"outputs of {site.first} serve several channels"
    return next((reason for name in _weights(site, side) if (reason := _held(root_of(model), name))), "")


def _weights(site: Site, side: Side) -> list[str]:
    """The tensors that make up A, or W, in the site's constraint."""
    assert site.first is not None and site.second is not None, "a strict site has a W and an A"
    if side == "A":
        return [site.second.weight]
    bias = [site.first.bias] if site.constraint == "augmented" and site.first.bias else []
    return [site.first.weight, *bias]


def _shared(model: nn.Module) -> dict[tuple[str, Side], str]:
    """Where one weight is the A, or the W, of several sites: moved for one of them, it leaves the variety of another."""
    root, found = root_of(model), dict[tuple[Side, int], list[Site]]()
    for site in sites(root):
        ends: tuple[tuple[Side, Affine | None], ...] = (("A", site.second), ("W", site.first))
        for side, affine in ends:
            if affine is not None:
                found.setdefault((side, id(_parameter(root, affine.weight))), []).append(site)
    return {
        (site.name, side): f"its {side} is that of {len(together)} sites"
        for (side, _), together in found.items()
        for site in together
        if len(together) > 1
    }


def _parameter(root: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that name; None where what has it is computed."""
    path, _, attribute = name.rpartition(".")
    return root.get_submodule(path)._parameters.get(attribute)


def _held(root: nn.Module, name: str) -> str:
    parameter = _parameter(root, name)
    if parameter is None:
        return f"{name} is computed from other parameters"
    if not parameter.requires_grad:
        return f"{name} is frozen"
    holders = sum(other is parameter for module in root.modules() for other in module._parameters.values())
    return f"{name} is tied to another parameter" if holders > 1 else ""


@torch.no_grad()
def change(model: nn.Module, site: Site, side: Side) -> float:
    """‖AP‖/‖A‖, or the like for W: how far the side must move, relative to its norm."""
    a, _, w = cells(model, site)
    basis = _basis(model, site, side).to(a.dtype)
    moved, whole = ((a @ basis), a) if side == "A" else ((basis.mT @ w), w)
    return float(torch.linalg.vector_norm(moved) / torch.linalg.vector_norm(whole).clamp(min=1e-30))


@torch.no_grad()
def cut(model: nn.Module, site: Site, side: Side, share: Tensor) -> None:
    """Take a share of the columns of DW out of A's rows, or of the rows of AD out of W's columns.

    The weight's own layout need not be known: its matrix form is a rearrangement of it (for W without a BatchNorm),
    whose derivative brings the change back to where it came from.
    """
    assert site.first is not None and site.second is not None, "a strict site has a W and an A"
    root, basis = root_of(model), _basis(model, site, side)
    with torch.enable_grad():
        a, _, w = cells(model, site)
    share = share.to(basis)
    matrix, affine = (a, site.second) if side == "A" else (w, site.first)
    values = matrix.detach().to(basis.dtype)
    step = -share * ((values @ basis) @ basis.mT if side == "A" else basis @ (basis.mT @ values))
    weight = root.get_parameter(affine.weight)
    weight.add_(torch.autograd.grad(matrix, weight, step.to(matrix.dtype))[0])
    if side == "W" and site.constraint == "augmented" and affine.bias:
        with torch.enable_grad():
            b = offset(root, affine)
        assert b is not None, "an augmented site has a constant"
        column = b.detach().to(basis.dtype).view(basis.shape[0], -1, 1)
        step = (-share * (basis @ (basis.mT @ column))).flatten()
        bias = root.get_parameter(affine.bias)
        bias.add_(torch.autograd.grad(b, bias, step.to(b.dtype))[0])


def _basis(model: nn.Module, site: Site, side: Side) -> Tensor:
    """An orthonormal basis of the columns of D W (or D [W b_W]), or of the rows of A D: (cells, n / cells, rank), double.

    Columns beyond the rank are zero.
    """
    a, d, w = (part.detach().double() for part in cells(model, site))
    if side == "W":
        spanning = (a * d.unsqueeze(1)).mT
    else:
        spanning = d.unsqueeze(2) * w
        b = offset(root_of(model), site.first) if site.constraint == "augmented" and site.first else None
        if b is not None:
            spanning = torch.cat([spanning, (d.flatten() * b.detach().double()).view(*d.shape, 1)], 2)
    # What is not finite is found and named right after; the decomposition would only raise its own error.
    u, s, _ = torch.linalg.svd(torch.nan_to_num(spanning, 0.0, 0.0, 0.0), full_matrices=False)
    smallest = s.amax(1, keepdim=True) * max(spanning.shape[1:]) * torch.finfo(s.dtype).eps
    basis: Tensor = u * (s > smallest).unsqueeze(1)
    return basis
