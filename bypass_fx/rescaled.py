"""Every δ times a factor of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .passes.matrices import is_sharded


def rescale(factors: Mapping[nn.Parameter, Tensor]) -> None:
    """Multiply every δ by its factor, 0-dim; on a GPU in a few kernels, however many there are.

    Example:
        >>> delta = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> with torch.no_grad():
        ...     rescale({delta: torch.tensor(0.5)})
        >>> delta.tolist()
        [0.5, 1.0]
    """
    alike = {(delta.dtype, delta.device) for delta in factors}
    if len(alike) == 1 < len(factors) and all(delta.is_cuda and not is_sharded(delta) for delta in factors):
        rescale_together(factors)
        return
    for delta, factor in factors.items():
        delta.mul_(factor.to(delta))


def rescale_together(factors: Mapping[nn.Parameter, Tensor]) -> None:
    """The same, of δ of one dtype on one device."""
    deltas: list[Tensor] = [*factors]
    sizes = [len(delta) for delta in factors]
    spread = torch.cat([factor.expand(size) for factor, size in zip(factors.values(), sizes, strict=True)])
    scaled = torch.cat(deltas) * spread.to(deltas[0])
    torch._foreach_copy_(deltas, torch.split(scaled, sizes))
