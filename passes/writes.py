"""Writes in place: which values of a graph something overwrites."""

from __future__ import annotations

import dis
import operator
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import works_in_place
from .calls import leaves
from .choices import pick, step_of
from .elementwise import activation_input
from .link import Linked
from .nodes import names_a_write
from .source import run_by_forward
from .units import Spot

_OF_THE_SAME_MEMORY = (
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "transpose", "permute", "t", "adjoint",
    "movedim", "moveaxis", "swapaxes", "swapdims", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to",
    "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "narrow", "select",
    "diagonal", "as_strided", "unfold", "real", "view_as_real", "atleast_1d", "atleast_2d", "atleast_3d", "detach",
    "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
)  # fmt: skip
_VIEWS: set[Any] = {
    *_OF_THE_SAME_MEMORY, *(getattr(torch, name) for name in _OF_THE_SAME_MEMORY if callable(getattr(torch, name, None))),
    operator.getitem, pick, getattr, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
}  # fmt: skip
_HAND_ON = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def overwritten(linked: Linked, value: Spot, except_by: fx.Node) -> bool:
    """Whether something but the node `except_by` writes into the value, or into a view of it, in whichever forward; one
    without a graph counts where its code, or that of a module inside, writes anything in place.
    """
    if not any_writes(linked):
        return False
    known = _known_values.setdefault(linked, {})
    if (value, except_by) not in known:
        known[value, except_by] = any(True for _ in _writers(linked, value, except_by))
    return known[value, except_by]


_known_values: WeakKeyDictionary[Linked, dict[tuple[Spot, fx.Node], bool]] = WeakKeyDictionary()


def writers(linked: Linked, value: Spot) -> Iterator[Spot]:
    """The calls that write into the value, or into a view of it, in whichever forward."""
    return _writers(linked, value) if any_writes(linked) else iter(())


def _writers(linked: Linked, value: Spot, except_by: fx.Node | None = None) -> Iterator[Spot]:
    todo, seen = [value], {value}
    while todo:
        here = todo.pop()
        for user in here.node.users:
            there = Spot(here.unit, user)
            if user is except_by or there in seen:
                continue
            if _writes(linked, there, here.node):
                yield there
            new = set(linked.use_steps(here, user) or ())
            if step_of(user).target in _VIEWS or isinstance(linked.module(there), _HAND_ON):
                new.add(there)
            todo += new - seen
            seen |= new


def overwritten_beside(linked: Linked, sigma: Spot) -> bool:
    """Whether something but the activation itself writes into its input, or into what that is a view of, wherever it was
    made.
    """
    z = activation_input(sigma.node)
    if z is None or not any_writes(linked):
        return False
    value: Spot | None = Spot(sigma.unit, z)
    for _ in range(_FARTHEST):
        if value is None:
            return False
        made = linked.source(value)
        if overwritten(linked, value, sigma.node) or (made != value and overwritten(linked, made, sigma.node)):
            return True
        value = _viewed(linked, made)
    return False


_FARTHEST = 20  # views of views


def _viewed(linked: Linked, view: Spot) -> Spot | None:
    """What a value is a view of, where making it overwrote nothing."""
    if not (step_of(view.node).target in _VIEWS or isinstance(linked.module(view), _HAND_ON)):
        return None
    first = next(iter(view.node.all_input_nodes), None)
    return Spot(view.unit, first) if first is not None and not _writes(linked, view, first) else None


def acts_in_place(linked: Linked, spot: Spot) -> bool:
    """Whether the call of an activation overwrites its input: by its flag or its name, or a step of its own forward does."""
    module = linked.module(spot)
    if works_in_place(spot.node, module):
        return True
    if module is None or not linked.activation_module(linked.child(*spot)):
        return False
    return any(map(names_a_write, _calls_in(linked, linked.child(*spot))))


def _calls_in(linked: Linked, path: str) -> list[fx.Node]:
    graphs = (linked.graphs[unit].graph for unit in linked.variants(path))
    return [node for graph in graphs for node in graph.nodes if node.op in ("call_function", "call_method")]


_known: WeakKeyDictionary[Linked, bool] = WeakKeyDictionary()


def any_writes(linked: Linked) -> bool:
    """Whether anything at all is written in place in the model: in many, nothing is."""
    if linked not in _known:
        graphs = ((unit, graph) for unit, owned in linked.graphs.items() for graph in owned.versions)
        calls = (Spot(unit, node) for unit, graph in graphs for node in graph.nodes if node.op.startswith("call"))
        _known[linked] = any(_writes(linked, spot, value) for spot in calls for value in spot.node.all_input_nodes)
    return _known[linked]


def _writes(linked: Linked, spot: Spot, value: fx.Node) -> bool:
    node = spot.node
    if node.op == "call_module":
        path = linked.child(*spot)
        if path in linked.failures and not linked.variants(path):
            return any(map(_may_write, linked.modules[path].modules()))
    elif _is_in(value, node.kwargs.get("out")):
        return True
    if not _is_in(value, node.args[0] if node.args else node.kwargs.get("input")):
        return False
    return acts_in_place(linked, spot) if node.op == "call_module" else names_a_write(node)


def _is_in(value: fx.Node, given: Any) -> bool:
    """Whether what a call is given is the value, or a list that holds it, as `torch._foreach_mul_` has one."""
    return given is value or (isinstance(given, list | tuple) and any(value is item for item in leaves(given)))


def _may_write(module: nn.Module) -> bool:
    """Whether a module writes in place, into whatever, by its flag or in its code."""
    return bool(getattr(module, "inplace", False)) or any(map(_names_a_write, run_by_forward(type(module))))


@cache
def _names_a_write(code: CodeType) -> bool:
    if not _constants(code).isdisjoint(("inplace", "out")):
        return True
    if any(name.endswith("_") and not name.endswith("__") for name in code.co_names):
        return True
    return any(
        step.opname in ("STORE_SUBSCR", "STORE_SLICE")
        or (step.opname.startswith("BINARY_OP") and step.argrepr.endswith("="))
        for step in dis.get_instructions(code)
    )


def _constants(code: CodeType) -> set[Any]:
    """Single constants of a code, and those in tuples, as which it holds the names of arguments."""
    return {each for constant in code.co_consts for each in (constant if isinstance(constant, tuple) else (constant,))}
