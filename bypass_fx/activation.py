"""The D-activation ψ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import fused
from .dense import channel_sums
from .passes.derivatives import ELEMENTWISE, Parameter, name_of
from .passes.errors import BypassError
from .passes.heads import with_heads_of


def psi(
    sigma: Tensor | nn.Module | str,
    z: Tensor,
    delta: Tensor,
    channels: int | tuple[int, ...],
    *parameters: Parameter,
) -> Tensor:
    """ψ(z) = σ(z) + D z with D = diag(δ), one coefficient per channel (eq. 7 and 8 of the paper).

    Args:
        sigma: σ(z), any shape and dtype; the result has its shape, dtype and memory format. Or σ itself, a module or
            one of the names in `passes.derivatives`: then both are one step of autograd, which keeps z and nothing else,
            but where z is small. A σ that works in place may overwrite z.
        z: the activation's input, of the same shape.
        delta: δ, shape (channels,).
        channels: the axis of z along which the channels lie; or the shape of δ against the last axes of z, where they
            lie along several: (heads, 1, head channels) for the values of attention, with shape
            (batch, heads, tokens, head channels) or (batch · heads, tokens, head channels). (channels, -1) stands for
            channels that each span a run of the last axis, as behind a flatten.
        *parameters: of the σ that is named.

    Raises:
        BypassError: z has another number of channels than δ, or another shape than σ(z), or is sparse or complex.

    Example:
        >>> z = torch.tensor([[-1.0, 2.0]])
        >>> psi(torch.relu(z), z, torch.tensor([0.5, 0.0]), -1)
        tensor([[-0.5000,  2.0000]])
        >>> psi("leaky_relu", z, torch.tensor([0.5, 0.0]), -1, 0.25)
        tensor([[-0.7500,  2.0000]])
    """
    if isinstance(sigma, Tensor):
        return _beside(sigma, z, delta, channels)
    if isinstance(sigma, str):
        name, given = sigma, parameters
    else:
        name = "" if _hooked(sigma) else name_of(type(sigma))
        given = tuple(getattr(sigma, attribute) for attribute in ELEMENTWISE[name].attributes) if name else ()
    if name and isinstance(channels, int) and torch.compiler.is_compiling():
        kernel = fused.fits(z, name, given) if _alone(z, delta, channels) else None
        if kernel:
            from .psi_op import psi_op  # an operator takes a while to register, and few need it

            return psi_op(z, _along(delta, z, channels), z.dim() - 1, *kernel)  # type: ignore[no-any-return]
    elif name and isinstance(channels, int) and _as_one_step(z, delta):
        return Within.apply(z, _along(delta, z, channels), name, given)  # type: ignore[no-any-return]
    if isinstance(sigma, nn.Module):
        kept = z.clone() if getattr(sigma, "inplace", False) else z
        return _beside(sigma(z), kept, delta, channels)
    return _beside(ELEMENTWISE[name].value(z, *given), z, delta, channels)


def _hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    everywhere = nn.modules.module
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def _alone(z: Tensor, delta: Tensor, channels: int) -> bool:
    """Whether a compiler would find no neighbour of ψ to fuse it with: behind a dense layer, the channels lie last."""
    return (
        channels in (-1, z.dim() - 1)
        and z.is_cuda
        and torch.is_grad_enabled()
        and (z.requires_grad or delta.requires_grad)
        and z.numel() >= _TINY
    )


def _as_one_step(z: Tensor, delta: Tensor) -> bool:
    """Whether σ and D are one step of autograd: for large plain tensors that nothing else takes apart anyway."""
    plain = type(z) is Tensor and type(delta) in (Tensor, nn.Parameter) and z.layout is torch.strided
    return (
        plain
        and not z.is_nested
        and z.is_floating_point()
        and torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()  # a mode sees the steps, and may keep σ(z)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        and not torch._C._are_functorch_transforms_active()  # they know every step by itself
        and (z.numel() >= _TINY or z.dtype != delta.dtype)  # δ's gradient is summed in its own dtype here alone
    )


_TINY = 2**16  # numbers: below, a step of autograd in Python takes longer than the two of torch's


class Within(torch.autograd.Function):
    """σ(z) + d z for a σ of the table, d having the shape of δ against z's last axes: keeps z and d, and no result.

    With g the gradient that arrives, z gets σ'(z) g + d g, and d gets Σ g z in its own dtype, over all but its channels.
    """

    @staticmethod
    def forward(  # with a setup_context, which functorch wants, each call would ask for this signature
        ctx: torch.autograd.function.FunctionCtx, z: Tensor, d: Tensor, name: str, parameters: tuple[Parameter, ...]
    ) -> Tensor:
        ctx.name, ctx.parameters = name, parameters  # type: ignore[attr-defined]
        ctx.save_for_backward(z, d)
        ctx.save_for_forward(z, d)
        ctx.kernel = kernel = fused.fits(z, name, parameters)  # type: ignore[attr-defined]
        if kernel:
            return fused.forward(z, d.flatten(), z.dim() - d.dim(), kernel)
        activated = ELEMENTWISE[name].value(z, *parameters)
        z, d = z.to(activated.dtype), d.to(activated.dtype)
        return torch.addcmul(activated, z, d, out=activated)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        z, d = ctx.saved_tensors  # type: ignore[attr-defined]
        of_z = of_d = None
        seen = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        if ctx.kernel and all(ctx.needs_input_grad[:2]) and not seen:  # type: ignore[attr-defined]
            of_z, sums = fused.backward(g, z, d.flatten(), z.dim() - d.dim(), ctx.kernel)  # type: ignore[attr-defined]
            return of_z, sums.to(d.dtype).view(d.shape), None, None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            slope = ELEMENTWISE[ctx.name].derivative(g, z, *ctx.parameters)  # type: ignore[attr-defined]
            of_z = torch.addcmul(slope, g, d.to(g.dtype)) if seen else slope.addcmul_(g, d.to(g.dtype))
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            of_d = channel_sums(g, z, z.dim() - d.dim(), step_by_step=seen).to(d.dtype).view(d.shape)
        return of_z, of_d, None, None

    @staticmethod
    def jvp(ctx: torch.autograd.function.FunctionCtx, dz: Tensor | None, dd: Tensor | None, *_: None) -> Tensor:
        z, d = ctx.saved_tensors  # type: ignore[attr-defined]
        along = z.new_zeros(()).expand_as(z) if dz is None else dz
        slope: Tensor = ELEMENTWISE[ctx.name].derivative(along, z, *ctx.parameters)  # type: ignore[attr-defined]
        moved = torch.addcmul(slope, along, d.to(along.dtype))
        return moved if dd is None else moved + z * dd.to(z.dtype)


def _beside(activated: Tensor, z: Tensor, delta: Tensor, channels: int | tuple[int, ...]) -> Tensor:
    if activated.is_nested:  # torch's fused attention layers pass ragged batches; addcmul takes none
        parts = zip(activated.unbind(), z.unbind(), strict=True)
        return torch.nested.as_nested_tensor([_beside(one, its_z, delta, channels) for one, its_z in parts])
    if activated.layout != torch.strided:
        raise BypassError(
            f"a D-activation met a {activated.layout} tensor: contract the model, and leave this site out with select"
        )
    if activated.is_complex() or z.is_complex():
        raise BypassError(
            "a D-activation met complex values, and D is real: contract the model, and extend it with example_inputs, or "
            "with select to leave this site out"
        )
    # δ is cast: addcmul under autocast, or with a wider δ, would promote the result
    d = delta.to(activated.dtype)
    if isinstance(channels, tuple):
        z = with_heads_of(z, activated.shape)
    d = _along(d, z, channels) if isinstance(channels, int) else _shaped(d, activated, z, channels)
    z = z.to(activated.dtype)
    if torch.compiler.is_compiling() and activated.dim() == 4 and _by_token(activated):
        # Heads of attention lie token by token in memory; in any other order a compiler would copy ψ for the layer behind
        d = d[(None,) * (4 - d.dim())]
        return torch.addcmul(activated.transpose(1, 2), z.transpose(1, 2), d.transpose(1, 2)).transpose(1, 2)
    return torch.addcmul(activated, z, d)


def _by_token(heads: Tensor) -> bool:
    """Whether (batch, heads, tokens, head channels) lies in memory as (batch, tokens, heads, head channels)."""
    return not heads.is_contiguous() and heads.transpose(1, 2).is_contiguous()


def _along(delta: Tensor, z: Tensor, axis: int) -> Tensor:
    met = z.shape[axis] if -z.dim() <= axis < z.dim() else 0
    if met != len(delta):
        raise BypassError(
            f"a D-activation with {len(delta)} coefficients met {met} channels on axis {axis}: "
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
