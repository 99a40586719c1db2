"""Dense tensors as matrices whose columns, or whose rows, are channels, in the order of memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """How a dense tensor lies in memory: rows of neighbours; whether a channel is a column of them, or some rows."""

    rows: int
    columns: int
    channels: int
    by_column: bool


def lies(shape: Sequence[int], strides: Sequence[int], axis: int) -> Matrix | None:
    """How a tensor lies in memory, its channels along `axis`, counted from 0; None if it has gaps, overlaps or no numbers.

    Example:
        >>> images = torch.empty(2, 3, 4, 5)
        >>> lies(images.shape, images.stride(), 1)
        Matrix(rows=6, columns=20, channels=3, by_column=False)
        >>> lies(images.shape, images.to(memory_format=torch.channels_last).stride(), 1)
        Matrix(rows=40, columns=3, channels=3, by_column=True)
        >>> lies((2, 2, 4, 5), images[:, :2].stride(), 1)
    """
    order = sorted((at for at, size in enumerate(shape) if size != 1), key=strides.__getitem__, reverse=True)
    expected = 1
    for at in reversed(order):
        if strides[at] != expected:
            return None
        expected *= shape[at]
    if not expected:
        return None
    behind = order[order.index(axis) + 1 :] if axis in order else order[1:]
    columns = prod(shape[at] for at in behind)
    if columns == 1 and axis in order:
        return Matrix(expected // shape[axis], shape[axis], shape[axis], True)
    return Matrix(expected // columns, columns, shape[axis], False)


_remembered = lru_cache(1024)(lies)
_ONLY_THE_WEIGHT_S = [False, True, False]  # of the gradients that BatchNorm's backward gives


def channel_sums(g: Tensor, z: Tensor, axis: int, step_by_step: bool = False) -> Tensor:
    """Σ g z over all axes but one, added up in float32 where g and z are narrower: shape (channels,).

    On a CPU, where z has no gaps, g z is not written out, nor rounded: the backward of BatchNorm takes this sum, for mean 0
    and variance 1, as it reads g and z. `step_by_step` does without it, in steps whose own derivative torch knows.

    Example:
        >>> channel_sums(torch.ones(2, 3), torch.arange(6.0).view(2, 3), 1)
        tensor([3., 5., 7.])
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    plain = type(g) is type(z) is Tensor and g.dtype == z.dtype
    at_once = plain and z.device.type == "cpu" and not step_by_step
    look = lies if torch.compiler.is_compiling() else _remembered
    matrix = look(z.shape, z.stride(), axis) if at_once else None
    if matrix is None:
        others = [at for at in range(z.dim()) if at != axis]
        return (g * z).sum(others, dtype=wide) if others else (g * z).to(wide)
    if g.stride() != z.stride():
        g = torch.empty_like(z).copy_(g)
    c, long = matrix.channels, matrix.columns
    if matrix.by_column:
        g, z = (each.as_strided((matrix.rows, c), (c, 1)) for each in (g, z))
    else:
        g, z = (each.as_strided((matrix.rows // c, c, long), (c * long, long, 1)) for each in (g, z))
    mean, scale = torch.zeros(c, dtype=wide, device=g.device), torch.ones(c, dtype=wide, device=g.device)
    found = torch.ops.aten.native_batch_norm_backward(
        g, z, None, None, None, mean, scale, True, 0.0, _ONLY_THE_WEIGHT_S
    )
    return found[1]  # type: ignore[no-any-return]
