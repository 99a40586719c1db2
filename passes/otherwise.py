"""Calls of an extended owner in another way than planned: how they differ, and whether a site stands in them as it did."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import keystr, tree_flatten_with_path

from .calls import Argument, Call, Constant, Items, Value
from .nodes import made_of


def differences(planned: Call, call: Call) -> str:
    """How a call differs from the one that was planned, and what can be done about it, in words for an error."""
    found = [
        f"{name} is {_said(now)} and was {_said(before)}"
        for (name, before), (_, now) in zip(planned.arguments, call.arguments, strict=True)
        if before != now
    ]
    keywords, others = ({} if each.stars is None else dict(each.stars[1]) for each in (planned, call))
    found += [f"{name} is passed and was not" for name in others.keys() - keywords]
    found += [f"{name} is not passed and was" for name in keywords.keys() - others]
    if any(_is_object(argument) for argument in (*dict(call.arguments).values(), *others.values())):
        found.append(WITHOUT)
    return f" ({'; '.join(found)})" if found else ""


WITHOUT = "an object such as a cache can't be followed, so call it without one, e.g. with use_cache=False"


def objects_in(call: Call) -> str:
    """The objects that a call passes and no graph can follow, in words for an error; "" where there are none."""
    passed = {**dict(call.arguments), **(dict(call.stars[1]) if call.stars else {})}
    found = [f"{name} is {_said(argument)}" for name, argument in passed.items() if _is_object(argument)]
    return f" ({'; '.join([*found, WITHOUT])})" if found else ""


def _is_object(argument: Argument) -> bool:
    return isinstance(argument, Value) and not issubclass(argument.container, Tensor)


def _said(argument: Argument) -> str:
    if isinstance(argument, Constant):
        return f"{argument.value!r:.40}"
    return f"a {argument.container.__name__}" + (f" of {len(argument.items)}" if isinstance(argument, Items) else "")


def stands_alike(one: fx.Graph, other: fx.Graph, delta: str) -> bool:
    """Whether two rewritten graphs make ψ's input alike, and do the same to its result up to what they return.

    What σ itself mixes with it, the weights of an attention, may differ.
    """
    return _around(one, delta) == _around(other, delta)


def _around(graph: fx.Graph, delta: str) -> list[tuple[Any, ...]]:
    """The calls that make z, and those that what ψ returns goes into with all that they read, in an order of their own."""
    deltas = {node for node in graph.nodes if node.op == "get_attr" and node.target == delta}
    psis = {user for node in deltas for user in node.users}
    after = set(psis)
    for node in graph.nodes:
        if any(before in after for before in node.all_input_nodes):
            after.add(node)
    read = [psi.args[1] for psi in psis if isinstance(psi.args[1], fx.Node)]
    read += [value for node in after - psis if node.op != "output" for value in node.all_input_nodes]
    told = after.union(made_of(read, psis))
    names: dict[fx.Node, str] = {}
    lines: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "output":
            leaves = tree_flatten_with_path(node.args[0])[0]
            lines.append(tuple((keystr(path), names[leaf]) for path, leaf in leaves if leaf in after))
        elif node in told:
            names[node] = f"%{len(names)}"
            args = node.args[1:] if node in psis else node.args
            passed = fx.map_arg((args, node.kwargs), lambda each: names.get(each, "σ"))
            lines.append((node.op, node.target, str(passed)))
    return lines
