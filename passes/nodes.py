"""Nodes of a graph: new ones, without what fx does for each and nobody needs here, and what they are made of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx


def new_node(
    graph: fx.Graph,
    op: str,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str | None = None,
    type_expr: Any | None = None,
) -> fx.Node:
    """As `graph.create_node`, which looks for symbolic numbers in the arguments first: half of its time."""
    node = graph.create_node(op, target, (), {}, name, type_expr)
    if args:
        _set_args(node, args)
    if kwargs:
        _set_kwargs(node, kwargs)
    return node


# Set like any other attribute, a node is put into its graph's index by target once more.
_set_args: Callable[[fx.Node, tuple[Any, ...]], None] = vars(fx.Node)["args"].fset
_set_kwargs: Callable[[fx.Node, dict[str, Any]], None] = vars(fx.Node)["kwargs"].fset


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and its nodes by those of the graph."""
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        name = None if node.op == "output" else node.name
        copies[node] = new_node(copy, node.op, node.target, args, kwargs, name, node.type)
        copies[node].meta.update(node.meta)
    return copy, copies


def same_code(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs have one text; most are told apart, or found alike, by their calls."""
    calls, others = ([(node.op, str(node.args), str(node.kwargs)) for node in graph.nodes] for graph in (one, other))
    if calls != others:
        return False
    named, those = ([(node.name, node.target) for node in graph.nodes] for graph in (one, other))
    return named == those or _text(one) == _text(other)


def _text(graph: fx.Graph) -> str:
    return str(graph.python_code("self").src)


_WRITING_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip


def names_a_write(node: fx.Node) -> bool:
    """Whether what a node calls writes in place, by its name or by a flag: `add_`, `x += y`, `relu(x, inplace=True)`."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    trailing = name.endswith("_") and not name.endswith("__")
    return trailing or node.target in _WRITING_OPERATORS or bool(node.kwargs.get("inplace"))


_RESHAPE_IN_PLACE = {
    *("unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "as_strided_"),
    *("resize_", "resize_as_", "set_"),
}


_looked_through: WeakKeyDictionary[fx.Graph, fx.Node] = WeakKeyDictionary()


def reshapes_in_place(graph: fx.Graph) -> bool:
    """Whether any call of a graph gives a value other axes in place; of a graph that grows, what is new is looked at."""
    last = _looked_through.get(graph)  # up to here none does
    node = next(iter(graph.nodes)) if last is None or last._erased else last.next
    while node.op != "root":  # behind the last one
        if (node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) in _RESHAPE_IN_PLACE:
            return True
        _looked_through[graph] = node
        node = node.next
    return False


def takes_no_argument(value: fx.Node) -> bool:
    """Whether a value is made of parameters, buffers and constants alone: no argument has a part in it."""
    return all(node.op != "placeholder" for node in made_of([value]))


def made_of(values: Iterable[fx.Node], ends: Iterable[fx.Node] = ()) -> Iterator[fx.Node]:
    """The values, and all that they are made of, back to these ends."""
    todo, seen = list(values), set(ends)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += node.all_input_nodes


class Verbatim:
    """Prints as itself, where generated code shows values: an argument, or a default in a signature, by its name."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text
