"""What a call of a module returns, where a forward may go by it: that it is None, or a tuple, or holds such.

A traced value stands for whatever a child returns; asked whether it is None, it says no. So a forward is traced again
where its children's own graphs tell better.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from .activations import acts_as
from .calls import Argument, Constant, Items, Value, plain_type
from .errors import UntraceableError
from .trace import OwnerGraph

NOTHING = Constant(None)


def settled(
    graph: OwnerGraph,
    again: Callable[[Mapping[str, Argument]], OwnerGraph],
    result: Callable[[fx.Node], Argument | None],
    is_opaque: Callable[[fx.Node], bool],
) -> OwnerGraph:
    """The graph, traced again until all that matters of what its children return is known to it.

    Args:
        again: traces the forward with what children return, by their paths.
        result: what a call of a child returns; None where that is not known.
        is_opaque: whether a node calls what no graph shows.

    Raises:
        UntraceableError: it can't be traced so, or calls of one child return different things.
    """
    returns: dict[str, Argument] = {}
    while (found := next(_unknown(graph, returns, result, is_opaque), None)) is not None:
        child, returned = found
        if child in returns:
            raise UntraceableError(f"its forward may go by what {child} returns, which differs between its calls")
        returns[child] = returned
        graph = again(returns)
    return graph


def _unknown(
    graph: OwnerGraph,
    known: Mapping[str, Argument],
    result: Callable[[fx.Node], Argument | None],
    is_opaque: Callable[[fx.Node], bool],
) -> Iterator[tuple[str, Argument]]:
    """The children whose calls return what matters and is not known, or not known so, in the order of the calls."""
    for version in filter(None, (graph, graph.in_eval)):
        for node in version.graph.nodes:
            returned = result(node) if node.op == "call_module" else None
            if returned is None:
                continue
            child = str(node.target)
            if known[child] != returned if child in known else _matters(returned, node, is_opaque):
                yield child, returned


def result_of(graph: OwnerGraph) -> Argument | None:
    """What a graph returns; None where that differs between training and eval mode."""
    returned = _told(graph.output)
    return returned if graph.in_eval is None or _told(graph.in_eval.output) == returned else None


def _told(output: Any) -> Argument:
    """None and containers as they are, all else as values."""
    if output is None:
        return NOTHING
    if not isinstance(output, list | tuple | dict):
        return Value()
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return Items(plain_type(output), tuple((key, _told(item)) for key, item in items))


def result_of_attention(module: nn.Module, node: fx.Node) -> Argument | None:
    """What a call of torch's attention returns where its weights are not asked for; None elsewhere."""
    if not isinstance(module, nn.MultiheadAttention) or not acts_as(module, nn.MultiheadAttention):
        return None
    wanted = node.args[4] if len(node.args) > 4 else node.kwargs.get("need_weights", True)
    return Items(tuple, ((0, Value()), (1, NOTHING))) if wanted is False else None


def _matters(result: Argument, node: fx.Node, is_opaque: Callable[[fx.Node], bool]) -> bool:
    """Whether the forward that the node stands in may go by what the call returns.

    It may where that is None or holds it, and where a tuple goes as a whole into what no graph shows: into a function
    that takes nested tuples apart, for example.
    """
    if not isinstance(result, Items):
        return result == NOTHING
    taken = all(user.target is operator.getitem for user in node.users)
    if result.container is not tuple and not taken:
        return False  # it may be changed
    return _holds_nothing(result) or any(map(is_opaque, node.users))


def _holds_nothing(result: Argument) -> bool:
    return result == NOTHING or (isinstance(result, Items) and any(_holds_nothing(each) for _, each in result.items))
