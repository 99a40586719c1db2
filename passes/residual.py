"""Residual blocks: which nodes of a graph stand on one branch of an add whose branches share an ancestor."""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import fx

from .callables import function_of
from .link import Linked
from .units import Spot, Unit

_ADDS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_"}

_found: WeakKeyDictionary[fx.Graph, frozenset[fx.Node]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Inside:
    """What is called from a branch of a residual block, at any depth: units, and paths of modules without a graph."""

    units: set[Unit] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)

    def holds(self, unit: Unit) -> bool:
        """Whether the unit stands inside."""
        return unit in self.units or any(_is_below(unit.path, path) for path in self.opaque)


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + ".")


def inside_residuals(linked: Linked) -> Inside:
    """Everything that is called from a branch of a residual block."""
    inside = Inside()
    todo = _added_in_source(linked, inside)
    for unit, owned in linked.graphs.items():
        for node in residual_nodes(linked, unit, owned.graph):
            todo += _entered(linked, unit, node, inside)
    while todo:
        unit = todo.pop()
        for node in linked.graphs[unit].graph.nodes:
            todo += _entered(linked, unit, node, inside)
    return inside


def _added_in_source(linked: Linked, inside: Inside) -> list[Unit]:
    """For forwards without a graph, their source is read: `x + self.block(...)` shows that `block` is a branch."""
    found: list[Unit] = []
    for path in linked.failures:
        methods = ("forward", *linked.tracing.methods(path))
        added = {name for method in methods for name in _added(function_of(linked.modules[path], method))}
        found += [unit for unit in linked.methods(path) if unit.method in added]
        children = {f"{path}.{name}".lstrip(".") for name in added}
        found += [unit for child in children for unit in linked.variants(child)]
        inside.opaque.update(child for child in children if child in linked.failures)
    inside.units.update(found)
    return found


@cache
def _added(function: Callable[..., object]) -> frozenset[str]:
    """The names in `self.name(...)` that stand on one side of an addition only."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # no source: nothing is known of it
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            names |= _called(node.left) ^ _called(node.right)
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            names |= _called(node.value)
    return frozenset(names)


def _called(tree: ast.AST) -> set[str]:
    """The names in `self.name(...)` anywhere below."""
    return {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }


def _entered(linked: Linked, unit: Unit, node: fx.Node, inside: Inside) -> list[Unit]:
    """The unit that a node of a branch calls, where it was not known to be inside yet."""
    if node.op != "call_module":
        return []
    callee = linked.callee(Spot(unit, node))
    if callee is None:
        path = linked.child(unit, node)
        inside.opaque.update([path] if path in linked.failures else [])
        return []
    if callee in inside.units:
        return []
    inside.units.add(callee)
    return [callee]


def residual_nodes(linked: Linked, unit: Unit, graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes on one branch of an add whose branches share an ancestor, and nodes applied to that add's result."""
    if graph not in _found:
        adds = {node: _operands(linked, unit, node) for node in graph.nodes}
        activations = frozenset(node for node in graph.nodes if linked.activation(Spot(unit, node)))
        _found[graph] = _branches(graph, {node: pair for node, pair in adds.items() if pair}, activations)
    return _found[graph]


def _operands(linked: Linked, unit: Unit, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that a node adds: by an operator, or by a module whose forward adds its two arguments."""
    tensors = [value for value in node.args if isinstance(value, fx.Node)]
    if node.target in _ADDS or (node.op == "call_method" and node.target in _ADD_METHODS):
        return (tensors[0], tensors[1]) if len(tensors) == 2 else None
    if node.op != "call_module" or len(tensors) != 2:
        return None
    callee = linked.callee(Spot(unit, node))
    result = linked.graphs[callee].output if callee else None
    if not isinstance(result, fx.Node) or result.target not in _ADDS | _ADD_METHODS:
        return None
    added = [value for value in result.args if isinstance(value, fx.Node) and value.op == "placeholder"]
    return (tensors[0], tensors[1]) if len(added) == 2 else None


def _branches(
    graph: fx.Graph, adds: dict[fx.Node, tuple[fx.Node, fx.Node]], activations: frozenset[fx.Node]
) -> frozenset[fx.Node]:
    order = list(graph.nodes)
    index = {node: i for i, node in enumerate(order)}
    above: list[int] = []  # a bit for every ancestor, the node itself included; parameters are nobody's ancestors
    for i, node in enumerate(order):
        bits = 0 if node.op == "get_attr" else 1 << i
        for value in node.all_input_nodes:
            bits |= above[index[value]]
        above.append(bits)
    inside = 0
    for node, (left, right) in adds.items():
        shared = above[index[left]] & above[index[right]]
        if not shared:
            continue
        one_branch = above[index[left]] ^ above[index[right]]
        members = [i for i in _bits(one_branch) if above[i] & shared]
        for i in members:
            inside |= 1 << i
        for user in activations.intersection(node.users):
            inside |= 1 << index[user]
    return frozenset(order[i] for i in _bits(inside))


def _bits(number: int) -> list[int]:
    return [i for i, digit in enumerate(reversed(bin(number)[2:])) if digit == "1"]
