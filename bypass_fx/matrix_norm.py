"""‖A D W‖ and its gradient in closed form (eq. 21 of the paper), for one site or many of one shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_GRAM_COSTS = 2  # a product in float64 against one in float32


def norm_of_product(a: Tensor, d: Tensor, w: Tensor) -> Tensor:
    """‖A D W‖ with D = diag(d) in the Frobenius norm over all cells; its gradient at zero is zero.

    Three matrix products for value and gradient, of A's and W's smaller sides. Where the n channels are few against the
    other sides (kernels with many taps), in float32 on the CPU, the Gram form √(dᵀ((AᵀA)∘(WWᵀ))d) is cheaper and A D W
    is not made; it is computed in float64, as what cancels in it near zero is the square of the norm.

    Args:
        a: A, shape (*sites, cells, m, n).
        d: the coefficients, shape (*sites, cells, n).
        w: W, shape (*sites, cells, n, l).

    Returns:
        A norm for each site, shape (*sites,).

    Example:
        >>> a, d, w = torch.ones(1, 2, 3), torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(1, 3, 2)
        >>> norm_of_product(a, d, w)
        tensor(4.)
    """
    if casts(a.device):
        with torch.autocast(a.device.type, enabled=False):
            return norm_of_product(a, d, w)
    apart = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    gram = gram_is_cheaper(a, w) and not apart
    if apart or not torch.is_grad_enabled() or (not gram and a.numel() + w.numel() < _TINY):
        return _gram(a, d, w)[0].to(a.dtype) if gram else _norm_of(_product(a, d, w))
    norm: Tensor = (_ByGram if gram else _ByProduct).apply(a, d, w)[0]
    return norm


def casts(device: torch.device) -> bool:
    """Whether autocast is on there, which would round the products."""
    compiling = torch.compiler.is_compiling()  # torch 2.11's compiler can't ask for what it compiles to offer autocast
    known = compiling or torch.amp.is_autocast_available(device.type)
    return bool(known and torch.is_autocast_enabled(device.type))


_TINY = 2**16  # numbers: below, a step of autograd in Python takes longer than its matrix products


def gram_is_cheaper(a: Tensor, w: Tensor) -> bool:
    """Whether n² (m + l) products in float64 are fewer than m n l in float32; there only is the Gram form used."""
    m, n, l = a.shape[-2], a.shape[-1], w.shape[-1]  # noqa: E741
    return a.device.type == "cpu" and a.dtype == torch.float32 and _GRAM_COSTS * n * (m + l) < m * l


def _product(a: Tensor, d: Tensor, w: Tensor) -> Tensor:
    times = torch.bmm if a.dim() == 3 else torch.matmul  # which would make views of what it is given first
    scaled_a = a.shape[-2] <= w.shape[-1]
    return times(a * d.unsqueeze(-2), w) if scaled_a else times(a, d.unsqueeze(-1) * w)


def _norm_of(r: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(r, dim=(-3, -2, -1))
    return norm


def _gram(a: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """‖A D W‖, AᵀA and WWᵀ, and whether all but rounding cancels in the Gram form: then the norm is the product's."""
    a, w, d = a.double(), w.double(), d.double()
    of_a, of_w = a.mT @ a, w @ w.mT
    both = of_a * of_w

    def form(matrix: Tensor, vector: Tensor) -> Tensor:
        return (vector * (matrix @ vector.unsqueeze(-1)).squeeze(-1)).sum((-2, -1))

    square = form(both, d)
    cancels = (square < _ROUNDING * form(both.abs(), d.abs())).any()
    norm = _norm_of(_product(a, d, w)) if cancels else square.clamp(min=0).sqrt()
    return norm, of_a, of_w, cancels


_ROUNDING = 1e-12  # of a form's square against the sum of its terms' sizes, in float64


def _gradients(factor: Tensor, r: Tensor, a: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R Wᵀ D, diag(AᵀR Wᵀ), D AᵀR) times the factor of each site, with R = A D W.

    The diagonal is taken from the smaller of R Wᵀ and AᵀR, which is wanted anyway.
    """
    by = factor[..., None, None]
    across, down = (by * d).unsqueeze(-2), (by * d).unsqueeze(-1)
    # The products are used no further; many gradients at once (is_grads_batched) are more than a product can hold.
    apart = torch.is_grad_enabled() or _is_batched(factor)
    scaled = torch.mul if apart else Tensor.mul_
    if a.shape[-2] <= w.shape[-1]:
        right = r @ w.mT
        of_d = by * (a * right).sum(-2)
        return scaled(right, across), of_d, scaled(a.mT @ r, down)
    left = a.mT @ r
    of_d = by * (w * left).sum(-1)
    return scaled(r @ w.mT, across), of_d, scaled(left, down)


def _is_batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_functorch_wrapped_tensor(tensor)


def _over(g: Tensor, norm: Tensor) -> Tensor:
    """g / norm, and 0 where the norm is."""
    return torch.where(norm == 0, torch.zeros_like(norm), g / norm)


class _Norm(torch.autograd.Function):
    """What both forms share; each returns the norm and what it computed on the way, which has no gradient."""

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        norm, *made = output
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.made = len(made)  # type: ignore[attr-defined]
        ctx.save_for_backward(*inputs, norm, *made)
        ctx.save_for_forward(*inputs, norm)

    @staticmethod
    def jvp(ctx: FunctionCtx, da: Tensor | None, dd: Tensor | None, dw: Tensor | None) -> tuple[Tensor | None, ...]:
        a, d, w, norm = ctx.saved_tensors[:4]  # type: ignore[attr-defined]
        moved = [_product(*parts) for parts in ((da, d, w), (a, dd, w), (a, d, dw)) if None not in parts]
        along = (_product(a, d, w) * torch.stack(moved).sum(0)).sum((-3, -2, -1))
        return _over(along, norm), *[None] * ctx.made  # type: ignore[attr-defined]


class _ByProduct(_Norm):
    @staticmethod
    def forward(a: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        r = _product(a, d, w)
        return _norm_of(r), r

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        a, d, w, norm, r = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.is_grad_enabled():  # differentiated again: R depends on all three
            r = _product(a, d, w)
        return _gradients(_over(g, norm), r, a, d, w)


class _ByGram(_Norm):
    @staticmethod
    def forward(a: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        norm, *made = _gram(a, d, w)
        return norm.float(), norm, *made

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        a, d, w, norm, exact, of_a, of_w, cancels = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.is_grad_enabled():
            return _gradients(_over(g, norm), _product(a, d, w), a, d, w)
        factor, wide = _over(g.double(), exact), d.double()
        if cancels:
            exactly = _gradients(factor, _product(a.double(), wide, w.double()), a.double(), wide, w.double())
            return tuple(each.float() for each in exactly)
        factor = factor[..., None, None]
        both = wide.unsqueeze(-1) * wide.unsqueeze(-2) * factor.unsqueeze(-1)
        of_d = factor * ((of_a * of_w) @ wide.unsqueeze(-1)).squeeze(-1)
        return (a.double() @ (of_w * both)).float(), of_d.float(), ((of_a * both) @ w.double()).float()
