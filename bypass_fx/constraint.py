"""The comeback constraint: ‖A D W‖, ‖A D [W b_W]‖ or ‖D‖ of every site, and their sum as a penalty."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .extension import root_of, sites
from .passes.matrices import columns, is_sharded, offset, rows, tensor_named
from .passes.plan import Site


def residual(model: nn.Module, site: Site) -> Tensor:
    """The norm that must vanish for the site to come back: ‖A D W‖ (Theorem 1), ‖A D [W b_W]‖, or ‖D‖ (eq. 24).

    Returns:
        A 0-dim tensor; its gradient at zero is zero.
    """
    return _norm(residual_entries(model, site))


def residual_entries(model: nn.Module, site: Site) -> Tensor:
    """The entries of A D W, A D [W b_W] or D, each once, one after another; linear in each of A, D and W. Shape (k,)."""
    model = root_of(model)
    delta = tensor_named(model, site.parameter)
    if site.constraint == "zero" or site.first is None or site.second is None:
        return delta
    parameters = model.get_submodule(site.second.weight.rpartition(".")[0]).parameters(recurse=False)
    if any(map(is_sharded, parameters)):
        from .sharded import frugal

        return frugal(lambda: _entries(model, site))
    return _entries(model, site)


def _entries(model: nn.Module, site: Site) -> Tensor:
    assert site.first is not None and site.second is not None, "a strict site has a W and an A"
    a, d, w = cells(model, site)
    products = [(a * d.unsqueeze(1)) @ w]
    b = offset(model, site.first) if site.constraint == "augmented" else None
    if b is not None:
        a = columns(model, site.second, site.width).to(d.dtype)
        products.append(a @ (d.flatten() * b.to(d.dtype)).view(a.shape[0], -1, 1))
    return torch.cat([product.flatten() for product in products])


def cells(model: nn.Module, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """A, D and W of a strict site, cut into the cells of channels that share one group of W and one of A.

    A D W falls apart into the products of the cells: what the groups leave zero is not in them.

    Returns:
        A (cells, outputs · taps, n / cells), δ (cells, n / cells), W (cells, n / cells, inputs · taps).
    """
    model = root_of(model)
    assert site.first is not None and site.second is not None, "a strict site has a W and an A"
    delta, w, a = tensor_named(model, site.parameter), rows(model, site.first), columns(model, site.second, site.width)
    dtype = torch.promote_types(delta.dtype, w.dtype)
    d, w, a = delta.to(dtype), w.to(dtype), a.to(dtype)
    count = max(a.shape[0], w.shape[0])
    if groups_cut(site):
        a, w, count = _dense(a), _dense(w), 1
    each = len(d) // count
    a = a.reshape(a.shape[0], a.shape[1], -1, each).transpose(1, 2).reshape(count, -1, each)
    return a, d.view(count, each), w.reshape(count, each, -1)


def groups_cut(site: Site) -> bool:
    """Whether groups of W and A cut through each other, so that two of them may share several cells."""
    assert site.first is not None and site.second is not None, "a strict site has a W and an A"
    few, many = sorted((site.first.groups, site.second.groups))
    return bool(many % few)


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
