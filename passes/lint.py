"""The check after insertion: the rewritten graph is the owner's graph with ψ behind each site, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import fx

from .errors import PlanError


def check_rewritten(before: fx.Graph, after: fx.Graph, sites: Set[fx.Node], psi: Callable[..., Any]) -> None:
    """Check a rewritten graph against the original one.

    Raises:
        PlanError: a node was lost, or a reader of σ was not moved to ψ.
    """
    bypasses = [node for node in after.nodes if node.op == "call_function" and node.target is psi]
    kept = [(node.op, node.target) for node in after.nodes if not _is_added(node, psi) and not _is_delta(node, psi)]
    expected = [(node.op, node.target) for node in before.nodes if node.target is not torch.clone]
    if kept != expected or len(bypasses) != len(sites):
        raise PlanError(
            "the rewritten forward is not the original with D-activations added: this is a defect of bypass_fx"
        )
    for bypass in bypasses:
        sigma = bypass.args[0]
        if sigma not in sites or (isinstance(sigma, fx.Node) and set(sigma.users) != {bypass}):
            raise PlanError(f"a reader of {sigma} was not moved to its D-activation: this is a defect of bypass_fx")


def _is_added(node: fx.Node, psi: Callable[..., Any]) -> bool:
    return node.op == "call_function" and (node.target is psi or node.target is torch.clone)


def _is_delta(node: fx.Node, psi: Callable[..., Any]) -> bool:
    return (
        node.op == "get_attr"
        and bool(node.users)
        and all(user.target is psi and user.args[2] is node for user in node.users)
    )
