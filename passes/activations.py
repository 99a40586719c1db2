"""The element-wise activations: one table of their module classes, functions and tensor methods."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .choices import Step

# name: (module classes, functions, tensor methods). A trailing underscore marks the in-place form, as in torch.
_TABLE: dict[str, tuple[tuple[type[nn.Module], ...], tuple[Callable[..., Any], ...], tuple[str, ...]]] = {
    "relu": ((nn.ReLU,), (F.relu, F.relu_, torch.relu, torch.relu_), ("relu", "relu_")),
    "relu6": ((nn.ReLU6,), (F.relu6,), ()),
    "leaky_relu": ((nn.LeakyReLU,), (F.leaky_relu, F.leaky_relu_), ()),
    "prelu": ((nn.PReLU,), (F.prelu, torch.prelu), ("prelu",)),
    "rrelu": ((nn.RReLU,), (F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), ()),
    "elu": ((nn.ELU,), (F.elu, F.elu_), ()),
    "celu": ((nn.CELU,), (F.celu, F.celu_, torch.celu, torch.celu_), ()),
    "selu": ((nn.SELU,), (F.selu, F.selu_, torch.selu, torch.selu_), ()),
    "gelu": ((nn.GELU,), (F.gelu,), ()),
    "silu": ((nn.SiLU,), (F.silu,), ()),
    "mish": ((nn.Mish,), (F.mish,), ()),
    "hardswish": ((nn.Hardswish,), (F.hardswish,), ()),
    "hardsigmoid": ((nn.Hardsigmoid,), (F.hardsigmoid,), ()),
    "hardtanh": ((nn.Hardtanh,), (F.hardtanh, F.hardtanh_), ()),
    "sigmoid": (
        (nn.Sigmoid,), (torch.sigmoid, torch.sigmoid_, F.sigmoid, torch.special.expit), ("sigmoid", "sigmoid_")
    ),
    "logsigmoid": ((nn.LogSigmoid,), (F.logsigmoid,), ()),
    "tanh": ((nn.Tanh,), (torch.tanh, torch.tanh_, F.tanh), ("tanh", "tanh_")),
    "tanhshrink": ((nn.Tanhshrink,), (F.tanhshrink,), ()),
    "hardshrink": ((nn.Hardshrink,), (F.hardshrink, torch.hardshrink), ("hardshrink",)),
    "softshrink": ((nn.Softshrink,), (F.softshrink,), ()),
    "softplus": ((nn.Softplus,), (F.softplus,), ()),
    "softsign": ((nn.Softsign,), (F.softsign,), ()),
    "threshold": ((nn.Threshold,), (F.threshold, torch.threshold, torch.threshold_), ()),
}  # fmt: skip

MODULES: dict[type[nn.Module], str] = {cls: name for name, (classes, _, _) in _TABLE.items() for cls in classes}
FUNCTIONS: dict[Callable[..., Any], str] = {fn: name for name, (_, functions, _) in _TABLE.items() for fn in functions}
METHODS: dict[str, str] = {method: name for name, (_, _, methods) in _TABLE.items() for method in methods}

NAMES: dict[str, str] = {
    **{getattr(fn, "__name__", ""): name for fn, name in FUNCTIONS.items()},
    **{cls.__name__: name for cls, name in MODULES.items()},
    **METHODS,
    F.scaled_dot_product_attention.__name__: "attention",
}


def acts_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of the module is the forward of torch's class and nothing else: not overridden, no hooks.

    Those of FSDP2 only gather the parameters.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False
    plain = type(module).forward is cls.forward and "forward" not in module.__dict__
    return plain and all(map(_gathers, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))


def _gathers(hook: Callable[..., Any]) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp.")


def module_activation(module: nn.Module) -> str | None:
    """The activation's name where the module is one of torch's own and its forward is not overridden."""
    for cls in type(module).__mro__:
        name = MODULES.get(cls)
        if name is not None and type(module).forward is getattr(cls, "forward", None):
            return name if "forward" not in module.__dict__ else None
    return None


def call_activation(node: fx.Node | Step) -> str | None:
    """The activation's name where the node calls one as a function or a tensor method."""
    if node.op == "call_function":
        return FUNCTIONS.get(node.target) if callable(node.target) else None
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def works_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the call overwrites its input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_"):
        return True
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    index = _inplace_position(node.target) if callable(node.target) else None
    return index is not None and len(node.args) > index and bool(node.args[index])


@cache
def _inplace_position(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # a builtin without a signature: none of them has an in-place flag
        return None
    return names.index("inplace") if "inplace" in names else None


# Attention mixes its values by weights: where the values V stand among the arguments.
MIXES: dict[Any, tuple[int, str]] = {
    F.scaled_dot_product_attention: (2, "value"),
    torch.matmul: (1, "other"), operator.matmul: (1, "other"), "matmul": (1, "other"),
    torch.bmm: (1, "mat2"), "bmm": (1, "mat2"),
    torch.einsum: (2, ""),
}  # fmt: skip
