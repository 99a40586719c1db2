"""Writes in place: which values of a graph something overwrites."""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from .choices import pick, step_of
from .link import Linked
from .nodes import names_a_write
from .units import Spot, Unit

_VIEWS: set[Any] = {
    "view", "view_as", "reshape", "flatten", "transpose", "permute", "t", "squeeze", "unsqueeze", "expand", "expand_as",
    "chunk", "split", "unbind", "narrow", "select", "detach", "contiguous", "unflatten", "movedim", "swapaxes",
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
    operator.getitem, pick, torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, getattr,
}  # fmt: skip


def overwritten(linked: Linked, value: Spot, except_by: fx.Node) -> bool:
    """Whether something but the node `except_by` writes into the value, or into a view of it."""
    if not _any_writes(linked, value.unit, value.node.graph):
        return False
    todo, seen = [value.node], {value.node}
    while todo:
        here = todo.pop()
        for user in here.users:
            if user is except_by or user in seen:
                continue
            if _writes(linked, Spot(value.unit, user), here):
                return True
            if step_of(user).target in _VIEWS:
                seen.add(user)
                todo.append(user)
    return False


_known: WeakKeyDictionary[Linked, dict[tuple[Unit, fx.Graph], bool]] = WeakKeyDictionary()


def _any_writes(linked: Linked, unit: Unit, graph: fx.Graph) -> bool:
    """Whether anything at all is written in place in a graph of the unit: in most, nothing is."""
    known = _known.setdefault(linked, {})
    if (unit, graph) not in known:
        spots = (Spot(unit, node) for node in graph.nodes if node.op.startswith("call"))
        known[unit, graph] = any(_writes(linked, spot, value) for spot in spots for value in _may_write_into(spot.node))
    return known[unit, graph]


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
    module = linked.module(spot)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    return names_a_write(node)
