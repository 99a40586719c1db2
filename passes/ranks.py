"""How many axes a value has, as far as its graph says."""

from __future__ import annotations

import operator
from collections.abc import Callable
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
_SIZED = {"view", "reshape", "expand", "repeat"}  # methods that get all sizes of their result
_MORE: dict[Any, int] = {"unsqueeze": 1, torch.unsqueeze: 1, torch.view_as_real: 1, torch.view_as_complex: -1}


def rank_of(value: fx.Node, owner: nn.Module, varies: Callable[[fx.Node], bool] = lambda size: False) -> int | fx.Node:
    """The number of a value's axes; or where that is open, the earlier value that has as many.

    Args:
        value: of a graph of the owner's.
        owner: the module whose children the graph calls.
        varies: whether a size is one of those that another number of axes gives more of.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return self.fc(x), x.permute(0, 2, 1).contiguous(), x.view(2, -1)[..., None]
        >>> net = Net()
        >>> *_, output = fx.symbolic_trace(net).graph.nodes
        >>> [rank_of(value, net) for value in output.args[0]]
        [x, 3, 3]
    """
    here, more = value, 0  # the value has so many axes more than what is here
    while here.args and isinstance(here.args[0], fx.Node):
        count = _said(here, varies)
        if count is not None:
            return count + more
        change = _more(here, owner)
        if change is None:
            break
        here, more = here.args[0], more + change
        value = here if not more else value
    return value


def _said(value: fx.Node, varies: Callable[[fx.Node], bool]) -> int | None:
    """The number of axes, where the step that makes the value says it: by an order of axes, or by all sizes."""
    if value.target not in _PERMUTING and not (value.op == "call_method" and value.target in _SIZED):
        return None
    given: Any = value.args[1:] if len(value.args) > 2 else value.args[1] if len(value.args) == 2 else None
    if not isinstance(given, tuple | list) or value.kwargs:
        return None
    if value.target in _PERMUTING:
        return len(given) if all(type(axis) is int for axis in given) else None
    plain = all(type(size) is int or (isinstance(size, fx.Node) and not varies(size)) for size in given)
    return len(given) if plain else None


def _more(value: fx.Node, owner: nn.Module) -> int | None:
    """How many axes more a value has than what its step takes; None where that is open."""
    if value.target is operator.getitem:
        return _more_taken(value.args[1])
    if value.target in _MORE:
        return _MORE[value.target]
    return 0 if _keeps_rank(value, owner) else None


def _more_taken(index: Any) -> int | None:
    """How many axes more a part of a tensor has, by its index. A slice alone may also be one of a tuple."""
    if not isinstance(index, tuple) or not any(each is Ellipsis for each in index):
        return None
    kinds = [0 if each is Ellipsis or type(each) is slice else 1 if each is None else -1 for each in index]
    plain = all(each is Ellipsis or each is None or type(each) in (slice, int) for each in index)
    return sum(kinds) if plain else None


def _keeps_rank(value: fx.Node, owner: nn.Module) -> bool:
    if value.op == "call_module":
        return type(owner.get_submodule(str(value.target))) in _MODULES
    known: set[Any] = _METHODS if value.op == "call_method" else _FUNCTIONS
    return value.target in _PERMUTING or value.target in known
