"""Where ψ and its backward are one kernel each: on a GPU, for activations whose kernels were seen to agree with torch."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .dense import channel_sums, lies
from .passes.derivatives import ELEMENTWISE, Elementwise, Parameter

if TYPE_CHECKING:
    from .triton_psi import Kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # how far rounding may take a norm, relatively


class Trust(NamedTuple):
    """Which of the two kernels of an activation can be taken."""

    forward: bool
    backward: bool


def kernel_of(name: str, parameters: tuple[Parameter, ...]) -> Kernel | None:
    """The kernel of an activation of the table, with its parameters; None where there is none.

    Example:
        >>> kernel_of("relu6", ()), kernel_of("gelu", ("tanh",)), kernel_of("mish", ())
        (('hardtanh', 0.0, 6.0), ('gelu_tanh', 0.0, 0.0), None)
    """
    if name == "gelu":
        return ("gelu_tanh" if parameters == ("tanh",) else "gelu", 0.0, 0.0)
    if name == "relu6":
        return ("hardtanh", 0.0, 6.0)
    if name in ("relu", "silu", "leaky_relu", "hardtanh"):
        p, q = (*map(float, parameters), 0.0, 0.0)[:2]
        return (name, p, q)
    return None


def torch_s_own(kernel: Kernel) -> tuple[Elementwise, tuple[Parameter, ...]]:
    """What torch has for a kernel."""
    name, p, q = kernel
    if name.startswith("gelu"):
        return ELEMENTWISE["gelu"], ("tanh" if name == "gelu_tanh" else "none",)
    return ELEMENTWISE[name], {"leaky_relu": (p,), "hardtanh": (p, q)}.get(name, ())


def fits(z: Tensor, name: str, parameters: tuple[Parameter, ...]) -> Kernel | None:
    """The kernel for this activation of z, where its backward at least can be taken."""
    if not z.is_cuda or z.dtype not in _DTYPES:
        return None
    kernel = kernel_of(name, parameters)
    return kernel if kernel and trust(kernel, z.dtype, z.device).backward else None


def forward(
    z: Tensor, d: Tensor, axis: int, kernel: Kernel, exact: bool = True, seen: Callable[[Any], Any] | None = None
) -> Tensor:
    """ψ(z); δ of shape (channels,), z's channels along `axis`. Where it need not be `exact`, σ may differ by rounding.

    `seen` lets a compiler see the launch of a kernel.
    """
    agrees = z.is_cuda and (trust(kernel, z.dtype, z.device).forward or not exact)
    matrix = lies(z.shape, z.stride(), axis) if agrees else None
    if matrix:
        from . import triton_psi

        return triton_psi.forward(z, d, kernel, matrix, seen or triton_psi.as_it_is)
    sigma, parameters = torch_s_own(kernel)
    activated = sigma.value(z, *parameters)
    return torch.addcmul(activated, z, _spread(d, z, axis), out=activated)


def backward(
    g: Tensor,
    z: Tensor,
    d: Tensor,
    axis: int,
    kernel: Kernel,
    seen: Callable[[Any], Any] | None = None,
    with_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of z and of δ, the latter a row, in float32 or wider: (1, channels).

    `with_bias`: a second row is that of a bias which the layer before has added to z, the sum of z's gradient.
    """
    matrix = lies(z.shape, z.stride(), axis) if z.is_cuda else None
    if matrix:
        from . import triton_psi

        if g.stride() != z.stride() or g.dtype != z.dtype:
            g = torch.empty_like(z).copy_(g)
        at_once = with_bias and matrix.by_column
        of_z, sums = triton_psi.backward(g, z, d, kernel, matrix, seen or triton_psi.as_it_is, at_once)
    else:
        sigma, parameters = torch_s_own(kernel)
        of_z = torch.addcmul(sigma.derivative(g, z, *parameters), g, _spread(d, g, axis))
        sums = channel_sums(g, z, axis, step_by_step=True)[None]
    if with_bias and len(sums) == 1:
        sums = torch.stack([sums[0], of_z.movedim(axis, 0).reshape(len(d), -1).sum(1, dtype=sums.dtype)])
    return of_z, sums


def _spread(d: Tensor, z: Tensor, axis: int) -> Tensor:
    return d.to(z.dtype).view(-1, *[1] * (z.dim() - 1 - axis))


def trust(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> Trust:
    """Which kernels of an activation can be built here and compute what torch's do; found out once, on random numbers."""
    if torch.cuda.is_current_stream_capturing():
        return Trust(False, False)  # numbers can't be looked at now
    return _trust(kernel, dtype, device)


vars(trust)["_dynamo_marked_constant"] = (
    True  # as torch.compiler.assume_constant_result does, which imports the compiler
)


@cache
def _trust(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> Trust:
    try:
        import triton
    except ImportError:  # not on every platform that torch is on
        return Trust(False, False)
    try:
        return agreement(kernel, dtype, device)
    except (triton.TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"the kernel for D-activations of {kernel[0]} can't be built for {device} ({type(error).__name__}: {error}); "
            "torch's own are taken, which read and write more",
            stacklevel=2,
        )
        return Trust(False, False)


@torch.no_grad()
def agreement(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> Trust:
    """Whether the kernels compute what torch does: the forward to the bit at D = 0, all else to rounding."""
    from . import triton_psi

    sigma, parameters = torch_s_own(kernel)
    generator = torch.Generator().manual_seed(0)
    value = slope = True
    for shape in ((600, 200), (4, 24, 1100)):
        z, g = (4 * torch.randn(shape, generator=generator) for _ in range(2))
        z[0, :4] = torch.tensor([0.0, -0.0, 100.0, -100.0]).view(-1, *[1] * (z.dim() - 2))
        z, g = z.to(device, dtype), g.to(device, dtype)
        d = torch.randn(shape[1], generator=generator).to(device)
        matrix = lies(z.shape, z.stride(), 1)
        assert matrix is not None, "a new tensor is dense"
        still = triton_psi.forward(z, torch.zeros_like(d), kernel, matrix)
        moved = triton_psi.forward(z, d, kernel, matrix)
        right = sigma.value(z, *parameters)
        spread = _spread(d, z, 1)
        value &= torch.equal(still, right) and _near(moved, torch.addcmul(right, z, spread))
        of_z, sums = triton_psi.backward(g, z, d, kernel, matrix, with_bias=matrix.by_column)
        slope &= _near(of_z, torch.addcmul(sigma.derivative(g, z, *parameters), g, spread))
        others = [at for at in range(z.dim()) if at != 1]
        for found, summand in zip(sums, (g.double() * z.double(), of_z.double()), strict=False):
            slope &= bool((found - summand.sum(others)).norm() <= 1e-5 * found.norm())
    return Trust(value and slope, slope)


def _near(found: Tensor, right: Tensor) -> bool:
    return bool((found.double() - right.double()).norm() <= NEAR[right.dtype] * right.double().norm())
