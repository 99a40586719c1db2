"""Which computed values are sure to be tensors, as far as their graph says: `assert isinstance(x, torch.Tensor)`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .activations import FUNCTIONS, MODULES, acts_as
from .recording import FACTORIES

# What makes a tensor of whatever it takes.
_MAKING: set[Any] = {
    *FACTORIES, *FUNCTIONS,
    torch.cat, torch.concat, torch.stack, torch.einsum, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm,
    torch.where, torch.softmax, torch.transpose, torch.permute, torch.reshape, torch.flatten, torch.squeeze,
    torch.unsqueeze, torch.clamp, torch.zeros_like, torch.ones_like, torch.randn_like, torch.rand_like, torch.roll,
    torch.add, torch.sub, torch.mul, torch.div, torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos, torch.abs,
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.embedding,
    F.softmax, F.log_softmax, F.dropout, F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm, F.normalize,
    F.interpolate, F.pad, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.scaled_dot_product_attention, F.glu,
}  # fmt: skip
# What makes a tensor where it takes one: of all its arguments, or of the first.
_OPERATORS: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.pow, operator.neg,
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
}  # fmt: skip
_METHODS = {
    "view", "reshape", "permute", "transpose", "contiguous", "flatten", "squeeze", "unsqueeze", "expand", "repeat",
    "to", "float", "half", "double", "bfloat16", "type_as", "clone", "detach", "softmax", "sigmoid", "tanh", "relu",
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "clamp", "clamp_", "masked_fill", "masked_fill_",
    "matmul", "bmm", "mm", "sum", "mean", "exp", "log", "sqrt", "square", "abs", "pow", "t",
}  # fmt: skip
_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.Softmax, _BatchNorm, _InstanceNorm, _ConvNd, _DropoutNd,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample, *MODULES,
)  # fmt: skip


def sure_tensor(value: fx.Node, owner: nn.Module, given: Mapping[fx.Node, type]) -> set[fx.Node] | None:
    """Whether a value is a tensor in every run: the arguments of which that must be so, or None where it is not sure.

    Args:
        value: of a graph of the owner's.
        owner: the module whose children the graph calls.
        given: the Python types of the arguments.
    """
    todo, seen = [value], {value}
    while todo:
        here = todo.pop()
        if here.op == "placeholder" and issubclass(given.get(here, object), Tensor):
            return {here}
        calls_maker = here.op == "call_module" and _makes_a_tensor(owner, str(here.target))
        places = here.target is torch.where and len(here.args) + len(here.kwargs) == 1  # a tuple of them
        if here.op == "get_attr" or (here.target in _MAKING and not places) or calls_maker:
            return set()
        taken = here.all_input_nodes if here.target in _OPERATORS else _first(here)
        todo += [each for each in taken if each not in seen]
        seen.update(taken)
    return None


def _first(value: fx.Node) -> list[fx.Node]:
    """The value that a call of a method works on, one that makes a tensor of a tensor."""
    works_on = value.args[0] if value.op == "call_method" and value.target in _METHODS else None
    return [works_on] if isinstance(works_on, fx.Node) else []


def _makes_a_tensor(owner: nn.Module, path: str) -> bool:
    module = owner.get_submodule(path)
    return any(isinstance(module, cls) and acts_as(module, type(module)) and _is_torchs(module) for cls in _MODULES)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.nn.modules.")


def names_a_kind(classes: Any) -> bool:
    """Whether one of the classes that isinstance() is asked for is torch.Tensor or lies below it."""
    if isinstance(classes, tuple):
        return any(map(names_a_kind, classes))
    return isinstance(classes, type) and issubclass(classes, Tensor)
