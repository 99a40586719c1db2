"""Writes in place: which values of a graph something overwrites."""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import works_in_place
from .choices import pick, step_of
from .elementwise import activation_input
from .link import Linked
from .nodes import names_a_write
from .units import Spot

_VIEWS: set[Any] = {
    "view", "view_as", "reshape", "flatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand", "expand_as",
    "chunk", "split", "unbind", "narrow", "select", "detach", "contiguous", "unflatten", "movedim", "swapaxes",
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
    operator.getitem, pick, torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, getattr,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d,
}  # fmt: skip
_HAND_ON = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def overwritten(linked: Linked, value: Spot, except_by: fx.Node) -> bool:
    """Whether something but the node `except_by` writes into the value, or into a view of it, in whichever forward."""
    if not _any_writes(linked):
        return False
    todo, seen = [value], {value}
    while todo:
        here = todo.pop()
        for user in here.node.users:
            there = Spot(here.unit, user)
            if user is except_by or there in seen:
                continue
            if _writes(linked, there, here.node):
                return True
            new = set(linked.use_steps(here, user) or ())
            if step_of(user).target in _VIEWS or isinstance(linked.module(there), _HAND_ON):
                new.add(there)
            todo += new - seen
            seen |= new
    return False


def overwritten_beside(linked: Linked, sigma: Spot) -> bool:
    """Whether something but the activation itself writes into its input."""
    z = activation_input(sigma.node)
    return z is not None and overwritten(linked, Spot(sigma.unit, z), sigma.node)


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


def _any_writes(linked: Linked) -> bool:
    """Whether anything at all is written in place in the model: in many, nothing is."""
    if linked not in _known:
        graphs = ((unit, graph) for unit, owned in linked.graphs.items() for graph in owned.versions)
        calls = (Spot(unit, node) for unit, graph in graphs for node in graph.nodes if node.op.startswith("call"))
        _known[linked] = any(_writes(linked, spot, value) for spot in calls for value in _may_write_into(spot.node))
    return _known[linked]


def _may_write_into(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that it can write into: its first, and the one it names."""
    return [value for value in (*node.args[:1], *node.kwargs.values()) if isinstance(value, fx.Node)]


def _writes(linked: Linked, spot: Spot, value: fx.Node) -> bool:
    node = spot.node
    if node.kwargs.get("out") is value:
        return True
    first = node.args[0] if node.args else node.kwargs.get("input")
    if first is not value:
        return False
    return acts_in_place(linked, spot) if node.op == "call_module" else names_a_write(node)
