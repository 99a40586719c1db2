"""The D-activation ψ."""

from __future__ import annotations

import torch
from torch import Tensor

from .passes.errors import BypassError


def psi(activated: Tensor, z: Tensor, delta: Tensor, channel_dim: int) -> Tensor:
    """ψ(z) = σ(z) + D z with D = diag(δ), one coefficient per channel (eq. 7 and 8 of the paper).

    Args:
        activated: σ(z), any shape and dtype; the result has its shape, dtype and memory format.
        z: the activation's input, of the same shape.
        delta: δ, shape (channels,).
        channel_dim: the axis of z along which the channels lie.

    Raises:
        BypassError: z has another number of channels than δ, or is sparse.

    Example:
        >>> z = torch.tensor([[-1.0, 2.0]])
        >>> psi(torch.relu(z), z, torch.tensor([0.5, 0.0]), -1)
        tensor([[-0.5000,  2.0000]])
    """
    if activated.is_nested:  # torch's fused attention layers pass ragged batches; addcmul takes none
        parts = zip(activated.unbind(), z.unbind(), strict=True)
        return torch.nested.as_nested_tensor([psi(one, its_z, delta, channel_dim) for one, its_z in parts])
    if activated.layout != torch.strided:
        raise BypassError(
            f"a D-activation met a {activated.layout} tensor: contract the model, and leave this site out with select"
        )
    if z.shape[channel_dim] != len(delta):
        raise BypassError(
            f"a D-activation with {len(delta)} coefficients met {z.shape[channel_dim]} channels on axis {channel_dim}: "
            "contract the model, and extend it with example_inputs, or with select to leave this site out"
        )
    behind = z.dim() - 1 - channel_dim if channel_dim >= 0 else -1 - channel_dim
    # δ is cast: addcmul under autocast, or with a wider δ, would promote the result
    d = delta.to(activated.dtype)
    return torch.addcmul(activated, z.to(activated.dtype), d.view(-1, *[1] * behind) if behind else d)
