"""The comeback constraint: ‖A D W‖, ‖A D [W b_W]‖ or ‖D‖ of every site, and their sum as a penalty."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .extension import root_of, sites
from .matrix_norm import casts, norm_of_product
from .passes.errors import SurgeryError
from .passes.matrices import columns, is_sharded, offset, rows, tensor_named
from .passes.plan import Site
from .passes.trace import module_at

Term = tuple[Tensor | None, Tensor, Tensor | None]  # A, d and W of a product, or d alone


def residual(model: nn.Module, site: Site) -> Tensor:
    """The norm that must vanish for the site to come back: ‖A D W‖ (Theorem 1), ‖A D [W b_W]‖, or ‖D‖ (eq. 24).

    Returns:
        A 0-dim tensor; its gradient at zero is zero.
    """
    return residuals(model, [site])[0]


def residuals(model: nn.Module, chosen: Sequence[Site]) -> list[Tensor]:
    """The norm of each of these sites, 0-dim, as `residual`; small sites of one shape in one batch."""
    model = root_of(model)
    found: list[Tensor | None] = [None] * len(chosen)
    batches: dict[Hashable, list[tuple[int, list[Term]]]] = {}
    for index, site in enumerate(chosen):
        if _is_sharded(model, site):
            from .sharded import frugal

            found[index] = frugal(partial(_norm_of_site, model, site))
            continue
        terms = _terms(model, site)
        present = [part for term in terms for part in term if part is not None]
        small = _SMALL_ON_GPU if present[0].is_cuda else _SMALL
        alone = index if sum(part.numel() for part in present) > small else None
        shapes = tuple(part.shape for part in present)
        batches.setdefault((alone, present[0].dtype, present[0].device, shapes), []).append((index, terms))
    for batch in batches.values():
        norms = _norms_of([terms for _, terms in batch])
        for (index, _), norm in zip(batch, norms.unbind() if norms.dim() else [norms], strict=True):
            found[index] = norm
    return [norm for norm in found if norm is not None]


_SMALL = 2**16  # numbers: below, a site's kernels take less time than it takes to call them
_SMALL_ON_GPU = 2**23  # and to launch them


def _is_sharded(model: nn.Module, site: Site) -> bool:
    if site.constraint == "zero" or site.second is None:
        return False
    parameters = module_at(model, site.second.weight.rpartition(".")[0])._parameters.values()
    return any(is_sharded(parameter) for parameter in parameters if parameter is not None)


def _terms(model: nn.Module, site: Site) -> list[Term]:
    """What the norm of a site is made of: one product, and one more for an augmented b_W."""
    if site.constraint == "zero" or site.first is None or site.second is None:
        return [(None, tensor_named(model, site.parameter), None)]
    a, d, w = cells(model, site)
    b = offset(model, site.first) if site.constraint == "augmented" else None
    if b is None:
        return [(a, d, w)]
    a_by_group, d_by_group, column = _beside(model, site, a, d, b)
    return [(a, d, w), (a_by_group, d_by_group, column)]


def _beside(model: nn.Module, site: Site, a: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, δ and the column b_W, by the groups of A alone."""
    assert site.second is not None, "a strict site has an A"
    if len(a) != site.second.groups:
        a = columns(model, site.second, site.width).to(d.dtype)
    d = d.reshape(len(a), -1)
    return a, d, b.to(d.dtype).view(*d.shape, 1)


def _norm_of_site(model: nn.Module, site: Site) -> Tensor:
    return _norms_of([_terms(model, site)])


def _norms_of(batch: Sequence[list[Term]]) -> Tensor:
    """The norms of sites whose terms have the same shapes, shape (sites,); of one site 0-dim."""
    parts: list[Tensor] = []
    for terms in zip(*batch, strict=True):  # the first term of every site, then the second
        a, d, w = (_stacked([term[k] for term in terms]) for k in range(3))
        assert d is not None, "a term has a δ"
        if a is None or w is None:
            parts.append(torch.linalg.vector_norm(d, dim=-1))
        else:
            parts.append(norm_of_product(a, d, w))
    norms: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return torch.stack(present) if len(present) > 1 else present[0]


def residual_entries(model: nn.Module, site: Site) -> Tensor:
    """The entries of A D W, A D [W b_W] or D, each once, one after another; linear in each of A, D and W. Shape (k,).

    In full precision, whatever autocast says.
    """
    model = root_of(model)
    delta = tensor_named(model, site.parameter)
    if casts(delta.device):
        with torch.autocast(delta.device.type, enabled=False):
            return residual_entries(model, site)
    if site.constraint == "zero" or site.first is None or site.second is None:
        return delta
    if _is_sharded(model, site):
        from .sharded import frugal

        return frugal(lambda: _entries(model, site))
    return _entries(model, site)


def _entries(model: nn.Module, site: Site) -> Tensor:
    assert site.first is not None and site.second is not None, "a strict site has a W and an A"
    a, d, w = cells(model, site)
    products = [torch.bmm(a * d.unsqueeze(1), w)]
    b = offset(model, site.first) if site.constraint == "augmented" else None
    if b is not None:
        a, d, column = _beside(model, site, a, d, b)
        products.append(torch.bmm(a, d.unsqueeze(2) * column))
    return products[0].flatten() if len(products) == 1 else torch.cat([product.flatten() for product in products])


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
    if count == 1:
        return a, d.unsqueeze(0), w
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


def norms(model: nn.Module) -> dict[str, Tensor]:
    """The residual of every site, by name, detached.

    Raises:
        SurgeryError: the model is not extended.

    Example:
        >>> import bypass_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> bypass_fx.norms(bypass_fx.extend(net))
        {'1': tensor(0.)}
    """
    with torch.no_grad():
        found = sites(model)
        return {site.name: norm for site, norm in zip(found, residuals(model, found), strict=True)}


def penalty(model: nn.Module, out: Iterable[str] | None = None) -> Tensor:
    """Σ ‖A D W‖ over the sites still out (eq. 17 without γ), differentiable, a 0-dim tensor.

    Args:
        out: names of the sites that count; all of the model's, if None.

    Raises:
        SurgeryError: the model is not extended, or has no site of a name.
    """
    found = sites(model)
    names = {site.name for site in found}
    chosen = names if out is None else frozenset(out)
    if not chosen <= names:
        raise SurgeryError(f"no site is called {min(chosen - names)!r}: the sites are {', '.join(sorted(names))}")
    terms = residuals(model, [site for site in found if site.name in chosen])
    if not terms:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
