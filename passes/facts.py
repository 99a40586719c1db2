"""What is known of a value without its numbers: its sizes, its dtype, its device, and what is made of these alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .choices import pick, step_of, value_inputs
from .foreign import NUMBERS

_OF_A_TENSOR = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_sparse"}
_OF_A_FACT = {"type", "index", "itemsize", "is_floating_point", "is_complex"}  # of a dtype or a device
_SIZES: set[Any] = {"size", "dim", "ndimension", "numel", "nelement", torch.numel, len}
_OF_DTYPE = {"is_floating_point", "is_complex", torch.is_floating_point, torch.is_complex}
_OPERATORS = {
    *(operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne, operator.getitem, pick),
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg),
    *(operator.pow, *NUMBERS.values()),
}


def is_fact(value: Any) -> bool:
    """Whether the node is known of a value without its numbers: a size, a dtype, or what is made of these alone."""
    return _made_of(value, _OF_A_TENSOR, _SIZES | _OF_DTYPE)


def is_size(value: Any) -> bool:
    """Whether the node is made of sizes alone."""
    return _made_of(value, {"shape", "ndim"}, _SIZES)


def _made_of(value: Any, attributes: set[str], questions: set[Any]) -> bool:
    """Whether a node is made of these attributes of values and of the answers to these questions alone."""
    met: dict[fx.Node, bool] = {}  # a size may be used in many ways, and what is made of it again

    def made(node: fx.Node) -> bool:
        if node not in met:
            met[node] = looked_at(node)
        return met[node]

    def looked_at(node: fx.Node) -> bool:
        step, inputs = step_of(node), value_inputs(node)
        if step.op not in ("call_function", "call_method"):
            return False
        if step.target is getattr:
            return step.args[1] in attributes or (step.args[1] in _OF_A_FACT and all(map(made, inputs)))
        if step.target in questions:
            return all(map(made, inputs[1:]))
        known = step.target in _OPERATORS or getattr(step.target, "__module__", "") in ("math", "numpy")
        return known and all(map(made, inputs))

    return isinstance(value, fx.Node) and made(value)
