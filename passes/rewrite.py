"""Rewriting a graph: ψ(z) = σ(z) + D z in the place of σ(z)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import is_not

import torch
from torch import Tensor, fx

from .activations import MIXES
from .elementwise import activation_input
from .errors import PlanError
from .link import Linked
from .lint import check_rewritten
from .nodes import copied
from .placed import placed_activation
from .plan import Site
from .trace import OwnerGraph
from .units import Spot, Unit
from .within import run_within, runs_within
from .writes import acts_in_place, overwritten_beside

Psi = Callable[..., Tensor]  # of σ(z), or σ, then z, δ and the channels


def runnable(linked: Linked, unit: Unit, owned: OwnerGraph, sites: Iterable[Site], psi: Psi) -> fx.Graph:
    """As `rewrite`, for the code: ψ runs the activations that it can run itself.

    Raises:
        PlanError: as `rewrite`.
    """
    graph, sigmas = _rewritten(linked, unit, owned, sites, psi)
    run_within(graph, psi, {sigma for node, sigma in sigmas.items() if runs_within(linked, unit, node)})
    return graph


def rewrite(linked: Linked, unit: Unit, owned: OwnerGraph, sites: Iterable[Site], psi: Psi) -> fx.Graph:
    """A copy of the owner's graph with ψ behind every site's σ.

    Raises:
        PlanError: the graph calls no activation where a site says so.
    """
    graph, _ = _rewritten(linked, unit, owned, sites, psi)
    graph.lint()
    return graph


def _rewritten(
    linked: Linked, unit: Unit, owned: OwnerGraph, sites: Iterable[Site], psi: Psi
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The graph, and its σ for each of the owner's."""
    graph, copies = copied(owned.graph)
    sigmas: dict[fx.Node, fx.Node] = {}
    for site in sites:
        node = owned.names.get(site.call)
        if node is None or not _may_be_site(linked, Spot(unit, node)):
            raise PlanError(
                f"{site.name}: {site.owner or 'the model'} calls no activation {site.call!r}; {remedy(linked)}"
            )
        sigma = copies[node]
        kept = activation_input(sigma)
        if kept is None:  # σ(None), as the defaults of a forward say that nobody calls so: a call with a z is rewritten
            continue
        sigmas[node] = sigma
        if overwritten_beside(linked, Spot(unit, node)) or acts_in_place(linked, Spot(unit, node)):
            with graph.inserting_before(sigma):
                kept = graph.call_function(torch.clone, (kept,))
        with graph.inserting_after(sigma):
            delta = graph.get_attr(site.delta)
        with graph.inserting_after(delta):
            bypassed = graph.call_function(psi, (sigma, kept, delta, site.view or site.channel_dim))
        sigma.replace_all_uses_with(bypassed, delete_user_cb=partial(is_not, bypassed))
    check_rewritten(owned.graph, graph, set(sigmas.values()), psi)
    return graph, sigmas


def _may_be_site(linked: Linked, spot: Spot) -> bool:
    return bool(linked.activation(spot) or placed_activation(linked, spot)) or spot.node.target in MIXES


def remedy(linked: Linked) -> str:
    """What to do about a plan that does not fit the model."""
    if linked.observed is not None:
        why = f" (the model does not run on these: {linked.observed.failure})" if linked.observed.failure else ""
        return f"plan this model anew, or pass the example_inputs that the plan was made with{why}"
    if linked.unseen:
        return "pass the example_inputs that the plan was made with, or plan this model anew"
    return "plan this model anew"
