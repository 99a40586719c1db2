"""The activation calls of a linked model, and what the rules ask about them."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from .activations import MIXES
from .channels import Channels, Provenance, channels_for
from .choices import pick, step_of
from .complex_values import is_complex, may_hold_complex
from .elementwise import activation_input
from .link import Linked
from .mixing import is_attention
from .nodes import made_of
from .outcome import SPLIT, Reason
from .placed import placed_activation
from .residual import Inside, inside_residuals, residual_nodes
from .shapes import Run
from .trace import OwnerGraph
from .units import ExampleInputs, Spot, Unit
from .wires import Layout, through


class Calls:
    """The activation calls of a linked model, with what the rules ask about them.

    Args:
        planned: whether the model is planned already, and extended: what was frozen since then was not when it was.
    """

    def __init__(self, linked: Linked, example_inputs: ExampleInputs | None = None, planned: bool = False) -> None:
        self.linked, self.example_inputs, self.planned = linked, example_inputs, planned
        self.origins = Provenance(linked)
        self._same_in_both: dict[Unit, bool] = {}
        self.paths: dict[Hashable, Any] = {}  # of attention's values, by what equal owners have in common

    def all(self) -> Iterator[tuple[str, Spot, str]]:
        """(site name, spot, activation) of every call, in the order in which the model defines its modules."""
        return (call for path in self.linked.modules for call in self.of(path))

    def of(self, path: str) -> Iterator[tuple[str, Spot, str]]:
        """The calls of one module: in its graphs, or the module's own where it is an activation that no graph calls."""
        if self.linked.activation_module(path):
            yield from self._alone(path)
            return
        for unit in self.linked.variants(path)[:1] or self.linked.methods(path):
            graph = self.linked.graphs[unit]
            helper = "" if unit.method == "forward" else unit.method + "."
            for node in graph.graph.nodes:
                spot = Spot(unit, node)
                activation = self.linked.activation(spot) or self.placed(spot) or self.attention(spot)
                if activation:
                    yield f"{path}.{helper}{graph.name_of[node]}".lstrip("."), spot, activation

    def _alone(self, path: str) -> Iterator[tuple[str, Spot, str]]:
        """An activation module that no graph calls: it is its own owner."""
        if path in self.linked.callers or (path not in self.linked.unseen and path):
            return
        for unit in self.linked.variants(path) or self.linked.own_unit(path):
            graph = self.linked.graphs[unit]
            for node in graph.graph.nodes:
                if node in graph.name_of and self.linked.activation(Spot(unit, node)):
                    yield path or graph.name_of[node], Spot(unit, node), self.linked.activation_module(path) or ""

    def attention(self, spot: Spot) -> str | None:
        """ "attention", where the call mixes values by weights; None elsewhere."""
        return "attention" if is_attention(self.linked, spot) else None

    def placed(self, spot: Spot) -> str | None:
        """The name of an activation that is one where it stands."""
        found = placed_activation(self.linked, spot)
        return found.name if found is not None else None

    @cached_property
    def in_residual(self) -> Inside:
        return inside_residuals(self.linked)

    def same_activations_in_both_modes(self, unit: Unit) -> bool:
        """Whether the calls of the training graph and of the eval graph are the same ones, one by one."""
        owned = self.linked.graphs[unit]
        if owned.in_eval is None or owned.same_calls:
            return True
        if unit not in self._same_in_both:
            self._same_in_both[unit] = self._activations_agree(unit, owned, owned.in_eval)
        return self._same_in_both[unit]

    def in_eval(self, spot: Spot) -> Spot | None:
        """The same call in the graph of eval mode, where that is another one; None where it is not seen to be there."""
        owned = self.linked.graphs[spot.unit]
        if owned.in_eval is None or not self.same_activations_in_both_modes(spot.unit):
            return None
        node = owned.in_eval.names.get(owned.name_of[spot.node])
        return Spot(spot.unit, node) if node is not None and self._tells_modes_apart(Spot(spot.unit, node)) else None

    def _activations_agree(self, unit: Unit, in_training: OwnerGraph, in_eval: OwnerGraph) -> bool:
        found = [
            [version.name_of[node] for node in version.graph.nodes if self._tells_modes_apart(Spot(unit, node))]
            for version in (in_training, in_eval)
        ]
        return found[0] == found[1]

    def _tells_modes_apart(self, spot: Spot) -> bool:
        """Whether the spot counts: steps that are an activation between affine maps alone are none where modes differ."""
        placed = placed_activation(self.linked, spot)
        known = placed is not None and not placed.only_between
        return known or self.linked.activation(spot) is not None or spot.node.target in MIXES

    def residual(self, spot: Spot) -> bool:
        graph = self.linked.graphs[spot.unit].graph
        return self.in_residual.holds(spot.unit) or spot.node in residual_nodes(self.linked, spot.unit, graph)

    def provenance(self, spot: Spot) -> Channels | None:
        """The channels of an activation's input by where it comes from, or by who reads the result."""
        z = activation_input(spot.node)
        known = self.origins.value(Spot(spot.unit, z)) if z is not None else None
        return known or channels_for(self.linked, spot)

    def channels(self, spot: Spot) -> Channels | Reason:
        """The channels by provenance, else by a run on the example inputs."""
        known = self.provenance(spot)
        if known is None and self.run is not None:
            known = self.run.channels.get(spot)
        if known is not None and known.width:
            return known
        text = "the number of its channels is not known from its neighbours"
        if self.run is None:
            return Reason(text, "pass example_inputs")
        if spot in self.run.batch:
            return BATCH
        if spot in self.run.positions:
            return POSITIONS
        met = list(dict.fromkeys(shape for shape, _ in self.run.calls.get(spot, ())))
        if met == [()]:
            return Reason("its input is a single number, which has no channels")
        if len(met) > 1:
            return Reason(
                f"{text}, and its calls have none in common: {met[0]}, {met[1]}", "give each call a module of its own"
            )
        if spot.unit in self.run.broken:
            return Reason(f"its graph does not run on what the model passes ({self.run.broken[spot.unit]})", SPLIT)
        why = f"the model does not run on them ({self.run.failure})" if self.run.failure else "they do not reach it"
        return Reason(f"{text}, nor from the example inputs: {why}", "pass other example_inputs")

    @cached_property
    def run(self) -> Run | None:
        """A run of the model on the example inputs, for the activations that provenance does not settle; for all where
        some values may be complex.
        """
        if self.example_inputs is None:
            return None
        wanted = [
            spot
            for _, spot, kind in self.all()
            if self.some_complex or (kind != "attention" and self.provenance(spot) is None)
        ]
        return Run(self.linked, wanted, self.example_inputs)

    @cached_property
    def some_complex(self) -> bool:
        return may_hold_complex(self.linked, self.example_inputs)

    def complex(self, spot: Spot) -> bool:
        """Whether the activation's input is known to be complex: by where it comes from, or by the run."""
        z = activation_input(spot.node) if self.some_complex else None
        if z is None:
            return False
        return is_complex(self.linked, Spot(spot.unit, z)) or (self.run is not None and spot in self.run.complex)

    def gates(self, spot: Spot) -> bool:
        """Whether the activation's result, through wires, multiplies a path that does not come from it."""
        todo, carriers = [spot], {spot}
        while todo:
            here = todo.pop()
            for use in self.linked.uses(here):
                if use is None or use in carriers:
                    continue
                carriers.add(use)
                if step_of(use.node).target in _PRODUCTS and _another_path(self.linked, use, carriers):
                    return True
                if through(Layout(-3), use.node, self.linked.module(use)) or step_of(use.node).target in _SPREADS:
                    todo.append(use)
        return False


BATCH = Reason(
    "its channels may be the rows of the batch: its input has a single axis, or one as long as the first axis of the inputs",
    "apply it where the value has an axis of channels, or pass example_inputs with another number of rows",
)

POSITIONS = Reason(
    "its channels would be positions: their number is another with inputs of another length",
    "apply it where the value has an axis of channels",
)

_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_SPREADS = {
    *(pick, torch.unsqueeze),
    *("expand", "expand_as", "view", "view_as", "reshape", "unsqueeze", "squeeze", "to", "type_as"),
}


def _another_path(linked: Linked, product: Spot, carriers: set[Spot]) -> bool:
    """Whether a factor comes from an input of the forward without passing the activation's result."""
    return any(_free_of(linked, product.unit, value, carriers) for value in product.node.all_input_nodes)


def _free_of(linked: Linked, unit: Unit, value: fx.Node, carriers: set[Spot]) -> bool:
    has_input = False
    for node in made_of([value]):
        spot = Spot(unit, node)
        if spot in carriers or (node.op == "placeholder" and linked.source(spot) in carriers):
            return False
        has_input = has_input or node.op in ("placeholder", "call_module")
    return has_input
