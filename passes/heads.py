"""Heads of values that several queries share (`enable_gqa` of scaled_dot_product_attention)."""

from __future__ import annotations

import torch
from torch import Tensor


def with_heads_of(values: Tensor, result: torch.Size) -> Tensor:
    """The values with each head repeated for the queries that share it, where the result has a multiple of their heads.

    >>> with_heads_of(torch.tensor([[[1.0]], [[2.0]]]), torch.Size([4, 1, 1])).flatten().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    if values.dim() < 3 or values.shape == result or result[-3] % values.shape[-3]:
        return values
    return values.repeat_interleave(result[-3] // values.shape[-3], -3)
