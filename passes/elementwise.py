"""Element-wise steps: modules and stretches of code that are an activation, and what an activation reads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .activations import MIXES, call_activation
from .nodes import names_a_write

_BENDS = (
    "pow", "exp", "log", "log1p", "expm1", "erf", "abs", "sqrt", "square", "clamp", "clip", "clamp_min", "clamp_max",
    "sin", "cos", "atan", "where", "maximum", "minimum",
)  # fmt: skip
_OTHERS = ("add", "sub", "mul", "div", "neg", "gt", "lt", "ge", "le")


def _forms(names: tuple[str, ...]) -> set[Callable[..., Any] | str]:
    """The functions and the methods of these names, in place too."""
    forms = [form for name in names for form in (name, f"{name}_")]
    return {*forms, *(getattr(torch, form) for form in forms if hasattr(torch, form))}


_BENDING = _forms(_BENDS) | {operator.pow}
_ARITHMETIC = {
    *_BENDING, *_forms(_OTHERS), operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.iadd,
    operator.isub, operator.imul, operator.itruediv, operator.gt, operator.lt, operator.ge, operator.le,
    torch.zeros_like, torch.ones_like,
}  # fmt: skip
_CHOOSES = (torch.where, "where")  # torch.where(condition) alone makes indices
_COMPARES = {
    operator.gt, operator.lt, operator.ge, operator.le, torch.gt, torch.lt, torch.ge, torch.le, "gt", "lt", "ge", "le",
}  # fmt: skip


def elementwise_activation(graph: fx.Graph, module: nn.Module) -> str | None:
    """The name of the activation that a module's forward is: element-wise steps from one argument, one of which bends it.

    Parameters that are a single number may enter the steps. A forward that is a single call of an activation has that
    call's name, every other one (`x * sigmoid(x)`, `sin(30 * x)`) that of the module's class.
    """
    *nodes, output = graph.nodes
    steps, result = nodes[1:], output.args[0]
    if not steps or nodes[0].op != "placeholder" or not isinstance(result, fx.Node) or result not in steps:
        return None
    if result.target in _COMPARES or not all(_is_elementwise(step, module) for step in steps):
        return None
    made_of = {nodes[0]}
    for step in steps:
        if not made_of.isdisjoint(step.all_input_nodes):
            made_of.add(step)
    if result not in made_of or not any(_bends(step) for step in steps if step in made_of):
        return None
    if not _makes_floats(nodes[0], steps, result, module):
        return None
    called = call_activation(steps[0]) if len(steps) == 1 else None
    return called or type(module).__name__


def _is_elementwise(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "get_attr":
        value = getattr(module, str(node.target), None)
        return isinstance(value, Tensor) and not is_lazy(value) and value.shape in ((), (1,))
    return _joins(node)


def _bends(node: fx.Node) -> bool:
    """Whether a step is no linear one."""
    return node.target in _BENDING or call_activation(node) is not None


class Stretch(NamedTuple):
    """Element-wise steps from one value to one result: `0.5 * x * (1 + erf(x / sqrt(2)))`."""

    entry: fx.Node
    steps: frozenset[fx.Node]


_LONGEST = 30  # steps of a stretch


def stretch_to(result: fx.Node) -> Stretch | None:
    """The element-wise steps that make a value of a single one, activations among them; None where there are none."""
    entries: set[fx.Node] = set()
    steps, todo = {result}, [result]
    while todo:
        node = todo.pop()
        if not _joins(node):
            if node is result or entries - {node}:
                return None
            entries.add(node)
            continue
        new = {value for value in node.all_input_nodes if value not in steps}
        todo += new
        steps |= new
        if len(steps) > _LONGEST:
            return None
    made = frozenset(steps - entries)
    return Stretch(entries.pop(), made) if entries else None


def ends_stretch(result: fx.Node) -> Stretch | None:
    """The stretch that ends in a value, where it bends what it reads, and nothing reads a value inside."""
    found = stretch_to(result)
    if found is None or result.target in _COMPARES or not any(map(_bends, found.steps)):
        return None
    if any(step is not result and not found.steps.issuperset(step.users) for step in found.steps):
        return None
    if len(found.steps) > 1 and any(map(names_a_write, found.steps)):
        return None
    longer = (stretch_to(user) for user in result.users)
    return None if any(other is not None and other.entry is found.entry for other in longer) else found


def end_around(inside: fx.Node) -> fx.Node | None:
    """The end of the stretch inside which a node stands; None where it stands in none."""
    seen, todo = {inside}, [inside]
    while todo:
        for user in todo.pop().users:
            if user in seen or not _joins(user):
                continue
            found = ends_stretch(user)
            if found is not None and inside in found.steps:
                return user
            seen.add(user)
            todo += [user] if len(seen) < _LONGEST else []
    return None


def _joins(node: fx.Node) -> bool:
    return is_step(node) or call_activation(node) is not None


def is_step(node: fx.Node) -> bool:
    """Whether a call is element-wise, and no activation by itself."""
    if node.op not in ("call_function", "call_method") or (node.target in _CHOOSES and len(node.args) != 3):
        return False
    return node.target in _ARITHMETIC


def stays_float(found: Stretch, result: fx.Node) -> bool:
    """Whether a stretch makes numbers to which D z can be added: `where(z > 0, 1, 0)` makes whole ones."""
    steps = [node for node in found.entry.graph.nodes if node in found.steps]
    return _makes_floats(found.entry, steps, result, nn.Module())


def _makes_floats(entry: fx.Node, steps: list[fx.Node], result: fx.Node, module: nn.Module) -> bool:
    """Whether the steps make floating-point numbers of such: where one chooses or compares, they are run on a value without
    memory.
    """
    if not any(step.target in _CHOOSES or step.target in _COMPARES or "dtype" in step.kwargs for step in steps):
        return True
    made: dict[fx.Node, Any] = {entry: torch.empty(2, device="meta")}
    try:
        with torch.no_grad():
            for step in steps:
                made[step] = _run(step, made, module)
    except (RuntimeError, TypeError, ValueError):  # steps that no forward gets through either
        return False
    return bool(made[result].is_floating_point())


def _run(step: fx.Node, made: dict[fx.Node, Any], module: nn.Module) -> Any:
    if step.op == "get_attr":
        value = getattr(module, str(step.target))
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    args, kwargs = fx.map_arg((step.args, step.kwargs), made.__getitem__)
    if step.op == "call_method":
        return getattr(args[0], str(step.target))(*args[1:], **kwargs)
    return step.target(*args, **kwargs)  # type: ignore[operator]


def bends_of(found: Stretch) -> list[fx.Node]:
    """The steps that bend, in their order."""
    return [node for node in found.entry.graph.nodes if node in found.steps and _bends(node)]


def activation_input(node: fx.Node) -> fx.Node | None:
    """The node z whose value the activation reads; of attention, the values V; of a stretch of steps, what it begins with."""
    if is_step(node):
        found = stretch_to(node)
        return found.entry if found is not None else None
    position, name = MIXES.get(node.target, (0, "input"))
    if len(node.args) > position:
        value = node.args[position]
    else:
        value = node.kwargs.get(name, next(iter(node.kwargs.values()), None))
    return value if isinstance(value, fx.Node) else None
