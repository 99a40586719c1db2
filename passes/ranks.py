"""How many axes a value has, as far as its graph says."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import acts_as
from .nodes import reshapes_in_place

# What gives its first argument as many axes as it had.
_MODULES = (nn.Linear, nn.Dropout, nn.LayerNorm, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softmax)
_METHODS = {
    *("contiguous", "transpose", "to", "float", "half", "bfloat16", "double", "type_as", "clone", "detach", "softmax")
}
_FUNCTIONS = {
    *(torch.transpose, torch.softmax, torch.relu, torch.tanh),
    *(F.softmax, F.dropout, F.relu, F.gelu, F.silu),
}
_SHAPED: dict[Any, int] = {  # what gets all sizes of its result, or the new order of all axes, from that argument on
    **dict.fromkeys(("view", "reshape", "expand", "repeat", "permute", torch.permute, torch.reshape), 1),
    **dict.fromkeys((torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn), 0),
}
_MORE: dict[Any, int] = {
    **dict.fromkeys(("unsqueeze", torch.unsqueeze, torch.view_as_real), 1),
    torch.view_as_complex: -1,
    **dict.fromkeys((operator.iadd, operator.isub, operator.imul, operator.itruediv), 0),
}
_SORTED = {"sort", "topk", torch.sort, torch.topk}  # pairs of values with as many axes
_SCALING = {operator.mul, operator.add, operator.sub, operator.truediv}

Varies = Callable[[fx.Node], bool]


def rank_of(value: fx.Node, owner: nn.Module, varies: Varies = lambda size: False) -> int | fx.Node:
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
    if reshapes_in_place(value.graph):
        return value  # what the graph says of it may not hold any more
    here, more = value, 0  # the value has so many axes more than what is here
    while True:
        told = _told(here, varies)
        told = _of_product(here, owner, varies) if told is None else told
        if told is not None:
            return told + more
        step = _step(here, owner)
        if step is None:
            return value
        here, more = step[0], more + step[1]
        value = here if not more else value


def _told(value: fx.Node, varies: Varies) -> int | None:
    """The number of axes, where the call that makes the value says it: by all sizes, or by an order of axes."""
    start = _SHAPED.get(_called(value))
    if start is None or len(value.args) <= start or value.kwargs.keys() - {"dtype", "device"}:
        return None  # `x.view(dtype=torch.int32)` says no size
    given: Any = value.args[start:]
    if len(given) == 1 and type(given[0]) is not int:
        given = given[0]
    plain = isinstance(given, tuple | list) and all(
        type(size) is int or (isinstance(size, fx.Node) and not varies(size)) for size in given
    )
    return len(given) if plain else None


def _of_product(value: fx.Node, owner: nn.Module, varies: Varies) -> int | None:
    """The axes of a product of two batches of matrices, where both are known."""
    if _called(value) not in (torch.matmul, operator.matmul, "matmul") or len(value.args) != 2:
        return None
    ranks = [rank_of(each, owner, varies) for each in value.args if isinstance(each, fx.Node)]
    known = [rank for rank in ranks if isinstance(rank, int) and rank > 1]
    return max(known) if len(known) == 2 else None


def _step(value: fx.Node, owner: nn.Module) -> tuple[fx.Node, int] | None:
    """What the value is made of, and how many axes more it has."""
    called, nodes = _called(value), [each for each in value.args if isinstance(each, fx.Node)]
    if called in _SCALING:
        scaled = len(value.args) == 2 and any(type(each) in (int, float) for each in value.args)
        return (nodes[0], 0) if scaled and nodes else None
    if not nodes or value.args[0] is not nodes[0]:
        return None
    first = nodes[0]
    if called is operator.getitem:
        if _called(first) in _SORTED:
            return (first.all_input_nodes[0], 0) if value.args[1] in (0, 1) and first.all_input_nodes else None
        more = _more_taken(value.args[1])
    else:
        more = _MORE.get(called, 0 if _keeps_rank(value, owner) else None)
    return None if more is None else (first, more)


def _more_taken(index: Any) -> int | None:
    """How many axes more a part of a tensor has, by its index; a number alone may take one of a tuple."""
    if type(index) is int or not all(
        each is None or each is Ellipsis or type(each) in (slice, int) for each in _parts(index)
    ):
        return None
    return sum(1 if each is None else -1 if type(each) is int else 0 for each in _parts(index))


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _called(value: fx.Node) -> Any:
    """The function, or the name of the method, that makes a value."""
    return value.target if value.op in ("call_function", "call_method") else None


def _keeps_rank(value: fx.Node, owner: nn.Module) -> bool:
    if value.op == "call_module":
        module = owner.get_submodule(str(value.target))
        return type(module) in _MODULES and acts_as(module, type(module))
    if value.target is F.linear:
        return _is_matrix(value.args[1] if len(value.args) > 1 else None, owner)
    return value.target in (_METHODS if value.op == "call_method" else _FUNCTIONS)


def _is_matrix(weight: Any, owner: nn.Module) -> bool:
    """Whether a weight has two axes: a vector takes the last axis away."""
    rank = rank_of(weight, owner) if isinstance(weight, fx.Node) else None
    if not isinstance(rank, fx.Node) or rank.op != "get_attr":
        return rank == 2
    path, _, name = str(rank.target).rpartition(".")
    held = owner.get_submodule(path)
    tensor = held._parameters.get(name, held._buffers.get(name))
    return tensor is not None and tensor.dim() == 2
