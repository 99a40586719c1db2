"""Rewriting a graph: ψ(z) = σ(z) + D z in the place of σ(z)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import is_not

import torch
from torch import Tensor, fx

from .activations import MIXES, activation_input, works_in_place
from .errors import PlanError
from .link import Linked
from .lint import check_rewritten
from .plan import Site
from .trace import OwnerGraph
from .units import Spot, Unit
from .writes import overwritten

Psi = Callable[[Tensor, Tensor, Tensor, int | tuple[int, ...]], Tensor]


def rewrite(linked: Linked, unit: Unit, owned: OwnerGraph, sites: Iterable[Site], psi: Psi) -> fx.Graph:
    """A copy of the owner's graph with ψ at every site.

    Raises:
        PlanError: the graph calls no activation where a site says so.
    """
    sites = list(sites)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(owned.graph, copies))
    for site in sites:
        node = owned.names.get(site.call)
        if node is None or (linked.activation(Spot(unit, node)) is None and node.target not in MIXES):
            raise PlanError(
                f"{site.name}: {site.owner or 'the model'} calls no activation {site.call!r}; plan this model anew"
            )
        sigma = copies[node]
        kept = activation_input(sigma)
        if kept is None:
            raise PlanError(f"{site.name}: the activation's input is no value of {site.owner or 'the model'}")
        z = activation_input(node)
        written = z is not None and overwritten(linked, Spot(unit, z), node)
        if written or works_in_place(node, linked.module(Spot(unit, node))):
            with graph.inserting_before(sigma):
                kept = graph.call_function(torch.clone, (kept,))
        with graph.inserting_after(sigma):
            delta = graph.get_attr(site.delta)
        with graph.inserting_after(delta):
            bypassed = graph.call_function(psi, (sigma, kept, delta, site.view or site.channel_dim))
        sigma.replace_all_uses_with(bypassed, delete_user_cb=partial(is_not, bypassed))
    check_rewritten(owned.graph, graph, {copies[owned.names[site.call]] for site in sites}, psi)
    return graph
