"""ψ and its backward as one kernel each (Triton): every number of z and of its gradient is read once and written once.

A dense tensor is seen as a matrix, each row of which is a run of neighbours in memory. δ has an entry for each column where
the channels lie innermost, as behind a dense layer or in channels-last images; else for each row, modulo C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .dense import Matrix

Kernel = tuple[str, float, float]  # the name of σ, and its parameters


class Launch(NamedTuple):
    """How a kernel is cut into programs.

    Attributes:
        numbers: that a program has at hand.
        by_column, by_row: the widest tile, in columns, where δ has an entry for each column, and for each row.
        warps: of a program.
        programs: of a backward, where there are as many tiles: several for each multiprocessor.
        stages: tiles that a program of a backward has on the way.
    """

    numbers: int
    by_column: int
    by_row: int
    warps: int
    programs: int = 0
    stages: int = 1


FORWARD = Launch(2048, 256, 1024, 4)
BACKWARD = Launch(2048, 256, 1024, 4, programs=1024, stages=4)


@triton.jit
def _activated(z, name: tl.constexpr, p, q):  # type: ignore[no-untyped-def]
    """σ(z) as torch computes it, z in float32."""
    if name == "relu":
        found = tl.where(z <= 0, 0.0, z)
    elif name == "leaky_relu":
        found = tl.where(z > 0, z, z * p)
    elif name == "hardtanh":
        found = tl.minimum(tl.maximum(z, p, tl.PropagateNan.ALL), q, tl.PropagateNan.ALL)
    elif name == "silu":
        found = tl.div_rn(z, 1.0 + libdevice.exp(-z))
    elif name == "gelu":
        found = z * 0.5 * (1.0 + libdevice.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(name == "gelu_tanh", "there is no kernel of this name")
        found = 0.5 * z * (1.0 + libdevice.tanh(0.7978845608028654 * (z + 0.044715 * (z * z * z))))
    return found


@triton.jit
def _sloped(g, z, name: tl.constexpr, p, q):  # type: ignore[no-untyped-def]
    """σ'(z) g as torch computes it, both in float32."""
    if name == "relu":
        found = tl.where(z <= 0, 0.0, g)
    elif name == "leaky_relu":
        found = tl.where(z > 0, g, g * p)
    elif name == "hardtanh":
        found = tl.where((z <= p) | (z >= q), 0.0, g)
    elif name == "silu":
        s = tl.div_rn(1.0, 1.0 + libdevice.exp(-z))
        found = g * s * (1.0 + z * (1.0 - s))
    elif name == "gelu":
        below = 0.5 * (1.0 + libdevice.erf(z * 0.7071067811865476))
        found = g * (below + z * (libdevice.exp(-0.5 * z * z) * 0.3989422804014327))
    else:
        tl.static_assert(name == "gelu_tanh", "there is no kernel of this name")
        t = libdevice.tanh(0.7978845608028654 * (z + 0.044715 * (z * z * z)))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * (z * z))
        found = g * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
    return found


@triton.jit
def psi_kernel(  # type: ignore[no-untyped-def]
    z_at, d_at, out_at, rows, columns, channels, p, q,
    name: tl.constexpr, by_column: tl.constexpr, high: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """σ(z) + d z; σ(z) and d are rounded to z's dtype, as where torch adds them."""
    row = tl.program_id(0) * high + tl.arange(0, high)
    column = tl.program_id(1) * wide + tl.arange(0, wide)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    z = tl.load(z_at + at, mask=there, other=0.0)
    if by_column:
        d = tl.load(d_at + column, mask=column < columns, other=0.0).to(z.dtype).to(tl.float32)[None, :]
    else:
        d = tl.load(d_at + row % channels, mask=row < rows, other=0.0).to(z.dtype).to(tl.float32)[:, None]
    x = z.to(tl.float32)
    activated = _activated(x, name, p, q).to(z.dtype).to(tl.float32)
    tl.store(out_at + at, (activated + x * d).to(z.dtype), mask=there)


@triton.jit
def psi_backward_kernel(  # type: ignore[no-untyped-def]
    g_at, z_at, d_at, of_z_at, sums_at, rows, columns, channels, p, q,
    strip, name: tl.constexpr, by_column: tl.constexpr, with_bias: tl.constexpr,
    high: tl.constexpr, wide: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """σ'(z) g + d g, and Σ g z: over strips of rows for each column, or over strips of columns for each row.

    `with_bias`, by column only: also the sums of the first, which are the gradient of a bias in z.
    """
    dtype = z_at.dtype.element_ty
    total = tl.zeros((high, wide), dtype=tl.float32)
    if with_bias:
        of_bias = tl.zeros((high, wide), dtype=tl.float32)
    if by_column:
        first_row, first_column = tl.program_id(0) * strip, tl.program_id(1) * wide
        mine = first_column + tl.arange(0, wide)
        d = tl.load(d_at + mine, mask=mine < columns, other=0.0).to(dtype).to(tl.float32)[None, :]
        step = high
    else:
        first_row, first_column = tl.program_id(0) * high, tl.program_id(1) * strip
        mine = first_row + tl.arange(0, high)
        d = tl.load(d_at + mine % channels, mask=mine < rows, other=0.0).to(dtype).to(tl.float32)[:, None]
        step = wide
    for start in tl.range(0, strip, step, num_stages=stages):
        row, column = first_row + tl.arange(0, high), first_column + tl.arange(0, wide)
        if by_column:
            row += start
        else:
            column += start
        there = (row < rows)[:, None] & (column < columns)[None, :]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        g = tl.load(g_at + at, mask=there, other=0.0).to(tl.float32)
        z = tl.load(z_at + at, mask=there, other=0.0).to(tl.float32)
        slope = _sloped(g, z, name, p, q).to(dtype).to(tl.float32)
        of_z = (slope + g * d).to(dtype)
        tl.store(of_z_at + at, of_z, mask=there)
        total += g * z
        if with_bias:
            of_bias += of_z.to(tl.float32)
    if by_column:
        at_sums = sums_at + tl.program_id(0) * (1 + with_bias) * columns + mine
        tl.store(at_sums, tl.sum(total, axis=0), mask=mine < columns)
        if with_bias:
            tl.store(at_sums + columns, tl.sum(of_bias, axis=0), mask=mine < columns)
    else:
        at_sums = sums_at + mine.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(at_sums, tl.sum(total, axis=1), mask=mine < rows)


def tile(matrix: Matrix, launch: Launch) -> tuple[int, int]:
    """Rows and columns that a program has at hand, powers of 2."""
    wide = min(triton.next_power_of_2(matrix.columns), launch.by_column if matrix.by_column else launch.by_row)
    return launch.numbers // wide, wide


def as_it_is(kernel: Any) -> Any:
    """How a kernel is launched outside of a compiler."""
    return kernel


def forward(z: Tensor, d: Tensor, kernel: Kernel, matrix: Matrix, seen: Callable[[Any], Any] = as_it_is) -> Tensor:
    """ψ(z), laid out as z; δ of shape (channels,). `seen`: what lets a compiler see the launch."""
    name, p, q = kernel
    high, wide = tile(matrix, FORWARD)
    out = torch.empty_like(z)
    grid = (triton.cdiv(matrix.rows, high), triton.cdiv(matrix.columns, wide))
    seen(psi_kernel)[grid](z, d, out, *matrix[:3], p, q, name, matrix.by_column, high, wide, num_warps=FORWARD.warps)
    return out


def backward(
    g: Tensor,
    z: Tensor,
    d: Tensor,
    kernel: Kernel,
    matrix: Matrix,
    seen: Callable[[Any], Any] = as_it_is,
    with_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of z, laid out as z, and, in float32, of δ in a row of its own; g must be laid out as z.

    `with_bias`, where the channels are columns: in a second row the sums of z's gradient.
    """
    name, p, q = kernel
    high, wide = tile(matrix, BACKWARD)
    down, across = triton.cdiv(matrix.rows, high), triton.cdiv(matrix.columns, wide)
    if matrix.by_column:
        strip = triton.cdiv(down, max(1, BACKWARD.programs // across)) * high
        grid = (triton.cdiv(matrix.rows, strip), across)
        sums = torch.empty(grid[0], 1 + with_bias, matrix.channels, dtype=torch.float32, device=z.device)
    else:
        strip = triton.cdiv(across, max(1, BACKWARD.programs // down)) * wide
        grid = (down, triton.cdiv(matrix.columns, strip))
        sums = torch.empty(
            matrix.rows // matrix.channels, matrix.channels, grid[1], dtype=torch.float32, device=z.device
        )
    of_z = torch.empty_like(z)
    seen(psi_backward_kernel)[grid](
        g, z, d, of_z, sums, *matrix[:3], p, q, strip, name, matrix.by_column, with_bias, high, wide, BACKWARD.stages,
        num_warps=BACKWARD.warps,
    )  # fmt: skip
    return of_z, sums.sum(0) if matrix.by_column else sums.sum([0, 2])[None]
