"""The D-activation ψ."""

from __future__ import annotations

import torch
from torch import Tensor

from .passes.errors import BypassError


def psi(activated: Tensor, z: Tensor, delta: Tensor, channels: int | tuple[int, ...]) -> Tensor:
    """ψ(z) = σ(z) + D z with D = diag(δ), one coefficient per channel (eq. 7 and 8 of the paper).

    Args:
        activated: σ(z), any shape and dtype; the result has its shape, dtype and memory format.
        z: the activation's input, of the same shape.
        delta: δ, shape (channels,).
        channels: the axis of z along which the channels lie; or the shape of δ against the last axes of z, where they
            lie along several: (heads, 1, head channels) for the values of attention, with shape
            (batch, heads, tokens, head channels) or (batch · heads, tokens, head channels). (channels, -1) stands for
            channels that each span a run of the last axis, as behind a flatten.

    Raises:
        BypassError: z has another number of channels than δ, or another shape than σ(z), or is sparse.

    Example:
        >>> z = torch.tensor([[-1.0, 2.0]])
        >>> psi(torch.relu(z), z, torch.tensor([0.5, 0.0]), -1)
        tensor([[-0.5000,  2.0000]])
    """
    if activated.is_nested:  # torch's fused attention layers pass ragged batches; addcmul takes none
        parts = zip(activated.unbind(), z.unbind(), strict=True)
        return torch.nested.as_nested_tensor([psi(one, its_z, delta, channels) for one, its_z in parts])
    if activated.layout != torch.strided:
        raise BypassError(
            f"a D-activation met a {activated.layout} tensor: contract the model, and leave this site out with select"
        )
    # δ is cast: addcmul under autocast, or with a wider δ, would promote the result
    d = delta.to(activated.dtype)
    d = _along(d, z, channels) if isinstance(channels, int) else _shaped(d, activated, z, channels)
    return torch.addcmul(activated, z.to(activated.dtype), d)


def _along(delta: Tensor, z: Tensor, axis: int) -> Tensor:
    if z.shape[axis] != len(delta):
        raise BypassError(
            f"a D-activation with {len(delta)} coefficients met {z.shape[axis]} channels on axis {axis}: "
            "contract the model, and extend it with example_inputs, or with select to leave this site out"
        )
    behind = z.dim() - 1 - axis if axis >= 0 else -1 - axis
    return delta.view(-1, *[1] * behind) if behind else delta


def _shaped(delta: Tensor, activated: Tensor, z: Tensor, view: tuple[int, ...]) -> Tensor:
    if activated.shape != z.shape:
        raise BypassError(
            f"attention with a D-activation met values of shape {tuple(z.shape)} and a result of {tuple(activated.shape)}: "
            "it must have as many queries as values; contract the model, and leave this site out with select"
        )
    if view[-1] == -1:
        return delta.repeat_interleave(z.shape[-1] // view[0])
    d = delta.view(view)
    merged = z.dim() == d.dim() and view[0] > 1  # batch and heads lie along one axis
    return d.repeat(z.shape[0] // view[0], *[1] * (d.dim() - 1)) if merged else d
