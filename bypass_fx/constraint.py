"""The comeback constraint: ‖A D W‖, ‖A D [W b_W]‖ or ‖D‖ of every site, and their sum as a penalty."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .extension import delta_of, root_of, sites
from .passes.matrices import columns, is_sharded, offset, rows, whole
from .passes.plan import Site


def residual(model: nn.Module, site: Site) -> Tensor:
    """The norm that must vanish for the site to come back: ‖A D W‖ (Theorem 1), ‖A D [W b_W]‖, or ‖D‖ (eq. 24).

    Returns:
        A 0-dim tensor; its gradient at zero is zero.
    """
    model = root_of(model)
    delta = whole(delta_of(model, site))
    if site.constraint == "zero" or site.first is None or site.second is None:
        return _norm(delta)
    parameters = model.get_submodule(site.second.weight.rpartition(".")[0]).parameters(recurse=False)
    if any(map(is_sharded, parameters)):
        from .sharded import frugal

        return frugal(lambda: _residual(model, site, delta))
    return _residual(model, site, delta)


def _residual(model: nn.Module, site: Site, delta: Tensor) -> Tensor:
    assert site.first is not None and site.second is not None
    w, a = rows(model, site.first), columns(model, site.second, site.width)
    dtype = torch.promote_types(delta.dtype, w.dtype)
    d, w, a = delta.to(dtype), w.to(dtype), a.to(dtype)
    products = [_product(a, d, w)]
    b = offset(model, site.first) if site.constraint == "augmented" else None
    if b is not None:
        products.append(a @ (d * b.to(dtype)).view(a.shape[0], -1, 1))
    return _norm(torch.cat([product.flatten() for product in products]))


def _product(a: Tensor, d: Tensor, w: Tensor) -> Tensor:
    """A D W for grouped maps; every entry of the dense product appears once, the ones that are zero by grouping do not.

    a: (groups of A, outputs · taps, n / groups), d: (n,), w: (groups of W, n / groups, inputs · taps).
    """
    of_a, of_w = a.shape[0], w.shape[0]
    cells = max(of_a, of_w)
    if cells % of_a or cells % of_w:  # groups that cut through each other: two groups may share several cells
        a, w, cells = _dense(a), _dense(w), 1
    each = len(d) // cells
    a = a.reshape(a.shape[0], a.shape[1], -1, each).transpose(1, 2).reshape(cells, -1, each)
    w = w.reshape(cells, each, -1)
    return (a * d.view(cells, 1, each)) @ w


def _dense(blocks: Tensor) -> Tensor:
    """Blocks (groups, rows, columns) on the diagonal of one matrix, with a group axis of 1."""
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix.unsqueeze(0)


def _norm(values: Tensor) -> Tensor:
    """The Frobenius norm; its gradient at zero is zero, not NaN."""
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm


def norms(model: nn.Module) -> dict[str, Tensor]:
    """The residual of every site, by name, detached.

    Example:
        >>> import bypass_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> bypass_fx.norms(bypass_fx.extend(net))
        {'1': tensor(0.)}
    """
    with torch.no_grad():
        return {site.name: residual(model, site) for site in sites(model)}


def penalty(model: nn.Module, out: Iterable[str] | None = None) -> Tensor:
    """Σ ‖A D W‖ over the sites still out (eq. 17 without γ), differentiable, a 0-dim tensor.

    Args:
        out: names of the sites that count; all of the model's, if None.
    """
    chosen = None if out is None else frozenset(out)
    terms = [residual(model, site) for site in sites(model) if chosen is None or site.name in chosen]
    if not terms:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
