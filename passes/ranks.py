"""How many axes a value has, as far as its graph says."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

# What gives its first argument as many axes as it had.
_MODULES = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softmax)
_METHODS = {
    "contiguous",
    "transpose",
    "to",
    "float",
    "half",
    "bfloat16",
    "double",
    "type_as",
    "clone",
    "detach",
    "softmax",
}
_FUNCTIONS = {
    torch.transpose,
    torch.softmax,
    torch.relu,
    torch.tanh,
    F.softmax,
    F.dropout,
    F.relu,
    F.gelu,
    F.silu,
    F.linear,
}
_PERMUTING = {torch.permute, "permute"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_SHAPED: dict[Any, int] = {  # by their arguments from that place on
    **dict.fromkeys(("view", "reshape", "expand", "repeat", "permute", torch.permute, torch.reshape), 1),
    **dict.fromkeys((torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn), 0),
}
_SORTED = {"sort", "topk", torch.sort, torch.topk}  # pairs of values with as many axes
_SCALING = {operator.mul, operator.add, operator.sub, operator.truediv}


def rank_of(value: fx.Node, owner: nn.Module) -> int | fx.Node:
    """The number of a value's axes; or where that is open, the earlier value that has as many.

    Args:
        value: of a graph of the owner's.
        owner: the module whose children the graph calls.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.fc(x), x.permute(0, 2, 1).contiguous()
        >>> net = Net()
        >>> *_, output = fx.symbolic_trace(net).graph.nodes
        >>> [rank_of(value, net) for value in output.args[0]]
        [x, 3]
    """
    while True:
        known = _told(value)
        if known is not None:
            return known
        before = _with_as_many(value, owner)
        if before is None:
            return _of_product(value, owner) or value
        value = before


def _told(value: fx.Node) -> int | None:
    """The number of axes that a call says its result has: that of the sizes, or of the axes in their new order."""
    start = _SHAPED.get(value.target)
    if start is None or value.kwargs.keys() - {"dtype", "device"}:
        return None
    given: Any = value.args[start:]
    if len(given) == 1:
        given = given[0]
        if type(given) is int and value.target is not torch.permute:
            return 1
    numbers = isinstance(given, tuple | list) and all(isinstance(each, int | fx.Node) for each in given)
    return len(given) if numbers else None


def _with_as_many(value: fx.Node, owner: nn.Module) -> fx.Node | None:
    """An earlier value that has as many axes."""
    if not (value.args and isinstance(value.args[0], fx.Node)):
        scaled = value.target in _SCALING and len(value.args) == 2 and isinstance(value.args[0], int | float)
        return value.args[1] if scaled and isinstance(value.args[1], fx.Node) else None
    first = value.args[0]
    if value.target is operator.getitem:
        if first.target in _SORTED and value.args[1] in (0, 1):
            return first.args[0] if first.args and isinstance(first.args[0], fx.Node) else None
        parts = value.args[1] if isinstance(value.args[1], tuple) else (value.args[1],)
        return first if all(isinstance(part, slice) for part in parts) else None
    scaled = value.target in _SCALING and len(value.args) == 2 and isinstance(value.args[1], int | float)
    return first if scaled or value.target in _IN_PLACE or _keeps_rank(value, owner) else None


def _of_product(value: fx.Node, owner: nn.Module) -> int | None:
    """The axes of a product of two batches of matrices, where both are known."""
    if value.target not in (torch.matmul, operator.matmul, "matmul") or len(value.args) != 2:
        return None
    ranks = [rank_of(each, owner) for each in value.args if isinstance(each, fx.Node)]
    known = [rank for rank in ranks if isinstance(rank, int) and rank > 1]
    return max(known) if len(known) == 2 else None


def _keeps_rank(value: fx.Node, owner: nn.Module) -> bool:
    if value.op == "call_module":
        return type(owner.get_submodule(str(value.target))) in _MODULES
    return value.target in (_METHODS if value.op == "call_method" else _FUNCTIONS)
