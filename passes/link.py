"""The dataflow of the whole model: the owners' graphs joined at the calls of their child modules.

Nothing is copied: a value is a `Spot` (which forward, which node of its graph), and `Linked.source` / `Linked.uses`
step from a spot to where its value comes from and where it goes, across owners. What can't be seen is taken at its
worst: a module that is called from code without a graph has unknown callers, and values that enter such code escape.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from .calls import bound_to_placeholders, leaves
from .choices import value_inputs
from .matrices import tensor_named
from .set_attributes import returning
from .units import Spot, Unit, Units

if TYPE_CHECKING:
    import networkx as nx


class Linked(Units):
    """The dataflow of a whole model in training mode: where each value comes from, and where it goes."""

    _seen_in_eval: Unit | None = None
    _passed: set[Unit] | None = None

    @contextmanager
    def in_eval(self, unit: Unit) -> Iterator[None]:
        """Inside, the graph of this one unit is that in eval mode, where it has one: its calls are followed, no others."""
        self._seen_in_eval = unit
        try:
            yield
        finally:
            self._seen_in_eval = None

    @contextmanager
    def passing(self) -> Iterator[set[Unit]]:
        """Inside, note the units that values are followed through, those that only hand them on among them."""
        outer, self._passed = self._passed, set()
        try:
            yield self._passed
        finally:
            self._passed = outer

    def readers(self, bias: str | None) -> int:
        """How many places read a bias, in the mode in which more do: calls of the module that holds it, and uses by name."""
        if bias is None:
            return 0
        holder = bias.rpartition(".")[0]
        if holder in self.unseen:
            return 2
        callers = () if holder in self._variants else self.callers.get(holder, ())
        in_training = sum(caller.node.graph is self.graphs[caller.unit].graph for caller in callers)
        in_eval = sum(caller.node.graph is self.graphs[caller.unit].versions[1] for caller in callers)
        return max(in_training, in_eval) + self.uses_by_name(bias)

    def uses_by_name(self, tensor: str | None) -> int:
        """How often graphs use a parameter or buffer by its name, and not by a call of the module that holds it."""
        return 0 if tensor is None else self._uses_by_name[self.tracing.names.first_name(tensor)]

    @cached_property
    def _uses_by_name(self) -> Counter[str]:
        """How often graphs use a parameter or buffer by its name: in training or in eval mode, whichever is more."""
        return self._uses_in(0) | self._uses_in(1)

    def _uses_in(self, version: int) -> Counter[str]:
        uses: Counter[str] = Counter()
        for unit, owned in self.graphs.items():
            prefix = f"{unit.path}." if unit.path else ""
            for node in owned.versions[version].nodes:
                if node.op == "get_attr":
                    uses[self.tracing.names.first_name(f"{prefix}{node.target}")] += len(node.users)
        return uses

    def stored(self, spot: Spot) -> Tensor | None:
        """The parameter or buffer that a spot reads; None where the model has none of that name."""
        try:
            return tensor_named(self.model, f"{spot.unit.path}.{spot.node.target}".lstrip("."))
        except AttributeError:
            return None

    def arguments(self, spot: Spot) -> list[Spot | None]:
        """What each caller passes for a placeholder; None where a caller passes no traced value."""
        found: list[Spot | None] = []
        for caller in self._seen_callers(spot.unit) or []:
            value = self._bound(caller, spot.unit).get(str(spot.node.target))
            found.append(Spot(caller.unit, value) if isinstance(value, fx.Node) else None)
        return found

    def source(self, spot: Spot) -> Spot:
        """Where the value comes from, stepping out to the caller's argument and into the callee's result.

        Stops at the first node that computes something, or where the way back is not unique.
        """
        while True:
            before = self._source_step(spot)
            if before is None:
                return spot
            spot = before
            if self._passed is not None:
                self._passed.add(spot.unit)

    def trail(self, spot: Spot, most: int) -> Iterator[Spot]:
        """Where the value comes from, where the first value that this is made of comes from, and so on, at most so far."""
        for _ in range(most):
            spot = self.source(spot)
            yield spot
            inputs = value_inputs(spot.node)
            if not inputs:
                return
            spot = Spot(spot.unit, inputs[0])

    def _source_step(self, spot: Spot) -> Spot | None:
        unit, call = spot
        index: tuple[Any, ...] = ()
        while call.op == "call_function" and call.target is operator.getitem and isinstance(call.args[0], fx.Node):
            index = (call.args[1], *index)
            call = call.args[0]
        if call.op == "placeholder":
            callers = self._seen_callers(unit)
            if callers is None or len(callers) != 1:
                return None
            there, whole = callers[0].unit, self._bound(callers[0], unit).get(str(call.target))
        else:
            callee = self.callee(Spot(unit, call))
            if callee is None:
                return None
            there, whole = callee, self.graphs[callee].output
        value = _item(whole, index)
        return Spot(there, value) if isinstance(value, fx.Node) else None

    def _seen_callers(self, unit: Unit) -> list[Spot] | None:
        """The spots that call the unit; None where others may exist."""
        if not unit.path or unit.path in self.unseen or unit.method != "forward":
            return None
        spots = self.callers.get(unit.path, [])
        return [spot for spot in spots if self.callee(spot) == unit and self._is_followed(spot)]

    def _is_followed(self, spot: Spot) -> bool:
        """Whether the spot is in the version of its unit's graph whose values are followed out of what it calls."""
        return spot.node.graph is self.graphs[spot.unit].versions[spot.unit == self._seen_in_eval]

    def _bound(self, caller: Spot, unit: Unit) -> dict[str, Any]:
        """The callee's placeholders and what the caller passes for them."""
        key = caller.node, unit
        if key not in self._known_bounds:
            signature = self.tracing.signature(unit.path, unit.method)
            assert signature is not None
            self._known_bounds[key] = bound_to_placeholders(signature, caller.node.args, caller.node.kwargs)
        return self._known_bounds[key]

    @cached_property
    def _known_bounds(self) -> dict[tuple[fx.Node, Unit], dict[str, Any]]:
        return {}

    def uses(self, spot: Spot) -> Iterator[Spot | None]:
        """The spots that read the value, across owners; None stands for a use that can't be followed."""
        seen: set[Spot] = set()
        todo = [spot]
        while todo:
            here = todo.pop()
            if here in seen:
                continue
            seen.add(here)
            if self._passed is not None:
                self._passed.add(here.unit)
            if here.node.name in self._kept_in_eval(here.unit) and here.node.graph is self.graphs[here.unit].graph:
                yield None
            for user in here.node.users:
                steps = self.use_steps(here, user)
                if steps is None:
                    yield Spot(here.unit, user) if user.op != "output" else None
                else:
                    todo += steps

    def _kept_in_eval(self, unit: Unit) -> Set[str]:
        """The names of the values that the graph in eval mode, where it is another, reads to set attributes."""
        if unit not in self._known_kept:
            in_eval = self.graphs[unit].in_eval
            graph = in_eval.graph if in_eval is not None else fx.Graph()
            staying = returning(graph)
            apart = set(graph.nodes).difference(staying)
            self._known_kept[unit] = {node.name for node in staying if not apart.isdisjoint(node.users)}
        return self._known_kept[unit]

    @cached_property
    def _known_kept(self) -> dict[Unit, Set[str]]:
        return {}

    def use_steps(self, spot: Spot, user: fx.Node) -> list[Spot] | None:
        """Where a wire leads: into the callee's placeholders, or out to the callers; None where `user` is no wire."""
        unit = spot.unit
        if user.op == "output":
            callers = self._seen_callers(unit)
            if callers is None or user.args[0] is not spot.node:
                return self._unpacked(unit, callers, spot.node, user)
            return callers
        callee = self.callee(Spot(unit, user))
        if callee is None:
            return None
        found: list[Spot] = []
        placeholders = {str(node.target): node for node in self.graphs[callee].graph.nodes if node.op == "placeholder"}
        for name, value in self._bound(Spot(unit, user), callee).items():
            if value is spot.node:
                found.append(Spot(callee, placeholders[name]))
            elif not isinstance(value, fx.Node) and spot.node in leaves(value):
                items = _readers(value, spot.node, placeholders.get(name))
                if items is None:
                    return None
                found += [Spot(callee, item) for item in items]
        return found

    def _unpacked(self, unit: Unit, callers: list[Spot] | None, node: fx.Node, output: fx.Node) -> list[Spot] | None:
        """The callers' `result[i]` for a value that is returned as the i-th of several."""
        result = output.args[0]
        if callers is None or isinstance(result, fx.Node):
            return None
        found: list[Spot] = []
        for caller in callers:
            items = _readers(result, node, caller.node)
            if items is None:
                return None
            found += [Spot(caller.unit, item) for item in items]
        return found

    @cached_property
    def digraph(self) -> nx.DiGraph[tuple[str, int, str, str]]:
        """The whole model as one networkx.DiGraph: nodes are (path, variant, method, node name), edges carry values."""
        import networkx as nx  # slow to import, and planning does without

        graph: nx.DiGraph[tuple[str, int, str, str]] = nx.DiGraph()
        for unit, owned in self.graphs.items():
            for node in owned.graph.nodes:
                graph.add_node((*unit, node.name), op=node.op, target=str(node.target), owner=unit.path)
        for unit, owned in self.graphs.items():
            for node in owned.graph.nodes:
                callee = self.callee(Spot(unit, node))
                if callee is None:
                    graph.add_edges_from(((*unit, value.name), (*unit, node.name)) for value in node.all_input_nodes)
                    continue
                bound = self._bound(Spot(unit, node), callee)
                for inner in self.graphs[callee].graph.nodes:
                    if inner.op == "placeholder":
                        given = [value for value in leaves(bound.get(str(inner.target))) if isinstance(value, fx.Node)]
                        graph.add_edges_from(((*unit, value.name), (*callee, inner.name)) for value in given)
                    elif inner.op == "output":
                        graph.add_edge((*callee, inner.name), (*unit, node.name))
        return graph


def _readers(whole: Any, value: fx.Node, container: fx.Node | None) -> list[fx.Node] | None:
    """The nodes `container[i]` that take the value out of a list, tuple or dict; None where it may be read otherwise."""
    if container is None or not isinstance(whole, list | tuple | dict):
        return None
    items = whole.items() if isinstance(whole, dict) else enumerate(whole)
    keys = [key for key, item in items if item is value]
    if len(keys) != sum(leaf is value for leaf in leaves(whole)):
        return None
    if any(user.target is not operator.getitem for user in container.users):
        return None
    return [user for user in container.users if user.args[1] in keys]


def _item(whole: Any, index: tuple[Any, ...]) -> Any:
    """`whole[i][j]…`; None where there is no such item, or where it is indexed at run time only."""
    for key in index:
        try:
            whole = None if isinstance(whole, fx.Node) else whole[key]
        except (TypeError, KeyError, IndexError):
            return None
    return whole
