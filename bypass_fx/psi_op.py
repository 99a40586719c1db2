"""ψ as an operator that torch.compile leaves whole: between two matrix products, where it has no neighbour to be fused with.

Inductor makes the δ-gradient there a pass of its own over z and its gradient; the operator's kernel sums on the way. The
compiler sees its launches, and makes them its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused


@torch.library.triton_op("bypass_fx::psi", mutates_args=())
def psi_op(z: Tensor, d: Tensor, axis: int, name: str, p: float, q: float) -> Tensor:
    """σ(z) + D z, z's channels along `axis`, counted from 0; `name`, `p` and `q` are those of `fused.kernel_of`."""
    exact = False  # nor is σ exact as Inductor writes it
    return fused.forward(z, d, axis, (name, p, q), exact, torch.library.wrap_triton)


@torch.library.triton_op("bypass_fx::psi_backward", mutates_args=())
def psi_backward_op(g: Tensor, z: Tensor, d: Tensor, axis: int, name: str, p: float, q: float) -> tuple[Tensor, Tensor]:
    """The gradients of z and δ."""
    return fused.backward(g, z, d, axis, (name, p, q), torch.library.wrap_triton)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, d, *rest = inputs
    ctx.save_for_backward(z, d)
    ctx.rest = rest


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    z, d = ctx.saved_tensors
    of_z, of_d = psi_backward_op(g, z, d, *ctx.rest)
    return of_z, of_d, None, None, None, None


psi_op.register_autograd(_gradients, setup_context=_keep)
