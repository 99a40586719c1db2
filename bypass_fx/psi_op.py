"""ψ as an operator that torch.compile leaves whole: between two matrix products, where it has no neighbour to be fused with.

Inductor makes the δ-gradient there a pass of its own over z and its gradient; the operator's kernel sums on the way. The
compiler sees its launches, and makes them its own.
"""

from __future__ import annotations

from hashlib import blake2s
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from . import fused

# Compilers keep on disk what they made of an operator, and go by its name: it must not outlive what the operator does.
_SOURCES = ("psi_op.py", "fused.py", "triton_psi.py", "dense.py")
_VERSION = blake2s(
    b"".join(files(__package__).joinpath(name).read_bytes() for name in _SOURCES), digest_size=4
).hexdigest()


@torch.library.triton_op(f"bypass_fx::psi_{_VERSION}", mutates_args=())
def psi_op(z: Tensor, d: Tensor, axis: int, name: str, p: float, q: float, bias: Tensor | None = None) -> Tensor:
    """σ(z) + D z, z's channels along `axis`, counted from 0; `name`, `p` and `q` are those of `fused.kernel_of`.

    `bias`: what a layer before has added to z, shape (channels,), without a gradient of its own: it gets it here.
    """
    exact = False  # nor is σ exact as Inductor writes it
    return fused.forward(z, d, axis, (name, p, q), exact, torch.library.wrap_triton)


@torch.library.triton_op(f"bypass_fx::psi_backward_{_VERSION}", mutates_args=())
def psi_backward_op(
    g: Tensor, z: Tensor, d: Tensor, axis: int, name: str, p: float, q: float, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of z, and of δ and the bias, row by row."""
    return fused.backward(g, z, d, axis, (name, p, q), torch.library.wrap_triton, with_bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, d, *rest, bias = inputs
    ctx.save_for_backward(z, d)
    ctx.rest, ctx.of_bias = rest, None if bias is None else bias.dtype


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    z, d = ctx.saved_tensors
    of_z, sums = psi_backward_op(g, z, d, *ctx.rest, ctx.of_bias is not None)
    return of_z, sums[0].to(d.dtype), None, None, None, None, sums[1].to(ctx.of_bias) if ctx.of_bias else None


psi_op.register_autograd(_gradients, setup_context=_keep)
