"""Where ψ may run σ itself: then σ's backward and ψ's share what they keep and what they read.

Elsewhere σ's own call stays, with ψ behind it: for activations that are not in the table, and where σ overwrites a z that
something else may see.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import acts_as, works_in_place
from .derivatives import called_with, name_of
from .link import Linked
from .units import Spot, Unit
from .writes import overwritten_beside

_MAKES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm,
          nn.GroupNorm)  # fmt: skip
_COMPUTES = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.batch_norm, F.layer_norm,
    F.group_norm, operator.add, torch.add, operator.sub, operator.mul, operator.matmul, torch.matmul,
}  # fmt: skip
_WRITES_INTO_ITS_FIRST = {operator.iadd, operator.isub, operator.imul}


def runs_within(linked: Linked, unit: Unit, node: fx.Node) -> bool:
    """Whether ψ may run the activation that this node of an owner's graph calls."""
    module = linked.module(Spot(unit, node))
    if module is not None:
        cls = type(module)
        if not name_of(cls) or len(node.args) != 1 or node.kwargs or not acts_as(module, cls):
            return False
    elif called_with(node) is None:
        return False
    if overwritten_beside(linked, Spot(unit, node)):
        return False
    return not works_in_place(node, module) or _seen_by_none_else(linked, unit, node.all_input_nodes[0])


def _seen_by_none_else(linked: Linked, unit: Unit, z: fx.Node) -> bool:
    """Whether z is made here, and its only reader the activation: what that leaves in z's memory is of no concern.

    A hook that is put on what makes z later sees z there, and no more σ(z).
    """
    if len(z.users) != 1 or nn.modules.module._global_forward_hooks:
        return False
    module = linked.module(Spot(unit, z))
    if module is not None:
        if type(module) is nn.Identity and acts_as(module, nn.Identity):
            return _seen_by_none_else(linked, unit, z.all_input_nodes[0])
        return type(module) in _MAKES and acts_as(module, type(module))
    if z.target in _WRITES_INTO_ITS_FIRST and isinstance(z.args[0], fx.Node):
        return _seen_by_none_else(linked, unit, z.args[0])
    return z.op == "call_function" and z.target in _COMPUTES


def run_within(graph: fx.Graph, psi: Callable[..., Any], chosen: Set[fx.Node]) -> None:
    """Hand ψ the activation in the place of its result: psi(σ(z), z, …) becomes psi(σ, z, …)."""
    for bypassed in [node for node in graph.nodes if node.target is psi]:
        sigma, kept, *rest = bypassed.args
        if not isinstance(sigma, fx.Node) or sigma not in chosen:
            continue
        z = sigma.all_input_nodes[0]
        if sigma.op == "call_module":
            sigma.op, sigma.args = "get_attr", ()
            bypassed.args = (sigma, z, *rest)
        else:
            called = called_with(sigma)
            assert called is not None, "the activation is one of the table"
            bypassed.args = (called[0], z, *rest, *called[1])
            graph.erase_node(sigma)
        if isinstance(kept, fx.Node) and not kept.users:
            graph.erase_node(kept)  # the copy of a z that σ would have overwritten
    graph.lint()
