"""Activations whose derivative their input alone gives: those that ψ runs itself, to keep nothing but that input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .activations import FUNCTIONS, METHODS

Parameter = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Elementwise:
    """σ(z, *parameters), and its derivative times g as a function of (g, z, *parameters).

    `module` is torch's module of it, which holds the parameters under the names `attributes`; `defaults` are those of
    the function.
    """

    module: type[nn.Module]
    value: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    attributes: tuple[str, ...] = ()
    defaults: tuple[Parameter, ...] = ()


_aten = torch.ops.aten


def _silu(g: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # torch has no derivative of this kernel, nor of mish's
        return _aten.silu_backward(g, z)  # type: ignore[no-any-return]
    s = z.sigmoid()
    return g * s * (1 + z * (1 - s))


def _mish(g: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.mish_backward(g, z)  # type: ignore[no-any-return]
    t = F.softplus(z).tanh()
    return g * (t + z * z.sigmoid() * (1 - t * t))


ELEMENTWISE: dict[str, Elementwise] = {
    "relu": Elementwise(nn.ReLU, F.relu, lambda g, z: _aten.threshold_backward(g, z, 0)),
    "relu6": Elementwise(nn.ReLU6, F.relu6, lambda g, z: _aten.hardtanh_backward(g, z, 0.0, 6.0)),
    "leaky_relu": Elementwise(
        nn.LeakyReLU, F.leaky_relu, lambda g, z, slope: _aten.leaky_relu_backward(g, z, slope, False),
        ("negative_slope",), (0.01,),
    ),
    "elu": Elementwise(
        nn.ELU, F.elu, lambda g, z, alpha: _aten.elu_backward(g, alpha, 1.0, 1.0, False, z), ("alpha",), (1.0,)
    ),
    "gelu": Elementwise(
        nn.GELU, lambda z, how: F.gelu(z, approximate=how),
        lambda g, z, how: _aten.gelu_backward(g, z, approximate=how), ("approximate",), ("none",),
    ),
    "silu": Elementwise(nn.SiLU, F.silu, _silu),
    "mish": Elementwise(nn.Mish, F.mish, _mish),
    "hardswish": Elementwise(nn.Hardswish, F.hardswish, _aten.hardswish_backward),
    "hardtanh": Elementwise(
        nn.Hardtanh, F.hardtanh, _aten.hardtanh_backward,
        ("min_val", "max_val"), (-1.0, 1.0),
    ),
}  # fmt: skip
_NAME_OF = {entry.module: (name, entry.module.forward) for name, entry in ELEMENTWISE.items()}


def name_of(cls: type[nn.Module]) -> str:
    """The name of the activation whose module this is, as torch made it; "" for all other classes."""
    name, forward = _NAME_OF.get(cls, ("", None))
    return name if cls.forward is forward else ""


def called_with(node: fx.Node) -> tuple[str, tuple[Parameter, ...]] | None:
    """The name and the parameters of an activation in the table that a node calls as a function or a method."""
    named = METHODS.get(str(node.target)) if node.op == "call_method" else None
    name = FUNCTIONS.get(node.target) if node.op == "call_function" and callable(node.target) else named
    if name not in ELEMENTWISE:
        return None
    entry = ELEMENTWISE[name]
    given: list[Parameter] = []
    positional = node.args[1:] if node.args else ()  # z itself may be named
    for index, (attribute, default) in enumerate(zip(entry.attributes, entry.defaults, strict=True)):
        value = positional[index] if index < len(positional) else node.kwargs.get(attribute, default)
        if not isinstance(value, bool | int | float | str):
            return None
        given.append(value)
    return name, tuple(given)
