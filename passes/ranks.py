"""How many axes a value has, as far as its graph says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

# What gives its first argument as many axes as it had.
_MODULES = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softmax)
_METHODS = {
    *("contiguous", "transpose", "to", "float", "half", "bfloat16", "double", "type_as", "clone", "detach", "softmax")
}
_FUNCTIONS = {
    *(torch.transpose, torch.softmax, torch.relu, torch.tanh),
    *(F.softmax, F.dropout, F.relu, F.gelu, F.silu, F.linear),
}
_PERMUTING = {torch.permute, "permute"}


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
    while value.args and isinstance(value.args[0], fx.Node):
        if value.target in _PERMUTING:
            order: Any = value.args[1:] if len(value.args) > 2 else value.args[1] if len(value.args) == 2 else None
            if isinstance(order, tuple | list) and all(type(axis) is int for axis in order):
                return len(order)
        if not _keeps_rank(value, owner):
            break
        value = value.args[0]
    return value


def _keeps_rank(value: fx.Node, owner: nn.Module) -> bool:
    if value.op == "call_module":
        return type(owner.get_submodule(str(value.target))) in _MODULES
    known: set[Any] = _METHODS if value.op == "call_method" else _FUNCTIONS
    return value.target in _PERMUTING or value.target in known
