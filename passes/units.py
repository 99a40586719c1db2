"""The traced forwards of a model as units, who calls whom, and what each module is."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from .activations import acts_as, call_activation, module_activation
from .callables import is_container, is_held, is_leaf
from .calls import Argument, Call, call_of, default_call
from .elementwise import elementwise_activation
from .errors import UntraceableError
from .look_alike import Stored, is_convolution, likeness, linear_look_alike, may_be_linear, plain_attributes
from .observed import Observed, observed
from .otherwise import objects_in
from .parts import taken_in_parts
from .results import result_of, result_of_attention, settled
from .set_attributes import refuse_mixed
from .trace import OwnerGraph, Tracing


class Arguments(NamedTuple):
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


ExampleInputs = tuple[Any, ...] | Mapping[str, Any]


def arguments_of(inputs: ExampleInputs) -> Arguments:
    """The call that example inputs make of a model's forward."""
    if isinstance(inputs, Arguments):
        return inputs
    return Arguments((), dict(inputs)) if isinstance(inputs, Mapping) else Arguments(tuple(inputs), {})


class Unit(NamedTuple):
    """One traced method: the module's path, the number of the variant (a module may be called in several ways), and the
    method: `forward`, or a helper of a forward that does not trace itself.
    """

    path: str
    variant: int = 0
    method: str = "forward"


class Spot(NamedTuple):
    """One value of the model: the result of a node in a unit's graph."""

    unit: Unit
    node: fx.Node


class Units:
    """The traced forwards of a model, and who calls whom.

    Attributes:
        graphs: the graph of every unit.
        callers: for every module path, the spots that call it.
        unseen: paths that may (also) be called from code without a graph.
        observed: the calls of modules that no graph calls, as a run on the example inputs showed them; None without one.
        failures: why a module has no graph.
        without: modules that get none, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        without: Mapping[str, UntraceableError] = MappingProxyType({}),
    ) -> None:
        self.model, self._halves = model, dict[str, UntraceableError]()
        self.tracing = Tracing(model)
        self.modules = self.tracing.modules
        self.graphs: dict[Unit, OwnerGraph] = {}
        self.callers: dict[str, list[Spot]] = {}
        self.unseen: set[str] = set()
        self.failures: dict[str, UntraceableError] = {}
        self._calls: dict[tuple[str, str], Unit] = {}
        self._callees: dict[Spot, Unit] = {}
        self._leaves: dict[str, bool] = {}
        self._plain_calls: dict[tuple[type, int], Call | None] = {}
        self._replacing: dict[str, bool] = {}
        self._activations: dict[str, str | None] = {}
        self._look_alikes: dict[str, Stored | None] = {}
        self._verdicts: dict[Hashable, Stored | None] = {}
        self._convolutions: dict[tuple[type, str], bool] = {}
        self._variants: dict[str, list[Unit]] = {}
        self._methods: dict[str, list[Unit]] = {}
        self._as_observed: set[str] = set()
        self.without = {**without, **taken_in_parts(self.tracing)}
        with self.tracing.session():
            self._enter("", _root_call(self.tracing, example_inputs))
        self.observed = self._observed(example_inputs)
        with self.tracing.session():
            for path, module in self.modules.items():  # what no graph calls may be called from anywhere
                if path and path not in self.callers and not is_container(module):
                    self.unseen.add(path)
                    self._enter_unseen(path)
            self.unseen |= self._mentioned_in_untraced_code()
        if self._halves:  # a module that traces in some of the ways in which it is called has no graph in any
            Units.__init__(self, model, example_inputs, {**self.without, **self._halves})

    def _observed(self, example_inputs: ExampleInputs | None) -> Observed | None:
        """What a run on the example inputs shows of the calls of modules that no graph calls; None without a run.

        There is none for a module that is analysed in the middle of a call (its `Arguments` are the inputs then).
        """
        if example_inputs is None or isinstance(example_inputs, Arguments):
            return None
        paths = [path for path in self.modules if path and path not in self.callers and not self._is_leaf(path)]
        paths = [path for path in paths if not is_container(self.modules[path])]
        return observed(self.tracing, paths, *arguments_of(example_inputs)) if paths else None

    def is_observed(self, path: str) -> bool:
        """Whether no graph calls a module, and its units are the calls that a run on the example inputs showed."""
        return path in self._as_observed

    def _enter_unseen(self, path: str) -> None:
        """Enter a module that no graph calls, for every call that was observed; as its defaults say where none was.

        Where one of them does not trace the module has no graph: one for other calls would not run in the model.
        """
        if self._is_leaf(path):
            return
        calls: dict[str, Call] = {}
        try:
            for call in self.observed.calls.get(path, ()) if self.observed else ():
                general = self._in_general(path, call)
                calls[general.key()] = general
        except UntraceableError as error:
            self.failures[path] = UntraceableError(f"{error}{objects_in(call)}")
            self._enter_methods(path)
            return
        if calls:
            self._as_observed.add(path)
        for entered in calls.values() or (None,):
            self._enter(path, entered)

    def _in_general(self, path: str, call: Call) -> Call:
        """The call that a module is traced for where it is called so: the one by its defaults, where that serves it too.

        Raises:
            UntraceableError: the module does not trace when it is called so.
        """
        signature = self.tracing.signature(path)
        assert signature is not None, "only calls with a signature are noted"
        default = default_call(signature)
        if default.covers(call):
            with suppress(UntraceableError):
                self.tracing.trace(path, default)
                return default
        self.tracing.trace(path, call)
        return call

    def _enter(self, path: str, call: Call | None) -> Unit | None:
        if self._is_leaf(path) or path in self.failures:
            return None
        key = call.key() if call else ""
        known = self._calls.get((path, key))
        if known is not None:
            return known
        unit = Unit(path, len(self.variants(path)))
        try:
            if path in self.without:
                raise self.without[path]
            graph = self._settled(unit, self.tracing.trace(path, call))
            refuse_mixed((self.graphs[each] for each in self.variants(path)), graph)
            self._add(unit, graph)
        except UntraceableError as error:
            self.failures[path] = error
            if self.variants(path):
                self._halves[path] = error
            self._enter_methods(path)
            return None
        self._calls[path, key] = unit
        return unit

    def _enter_methods(self, path: str) -> None:
        """A forward without a graph: the helper methods and held callables that it calls may have one: units of their own."""
        if self.tracing.signature(path) is None:
            return
        for method in self.tracing.methods(path):
            self._enter_method(path, method)
        traced = {unit.method for unit in self.methods(path)}
        for name in self.tracing.callable_attributes(path, traced):
            self._enter_method(path, name)

    def _enter_method(self, path: str, method: str) -> None:
        try:
            unit = Unit(path, 0, method)
            graph = self._settled(unit, self.tracing.trace(path, method=method))
        except UntraceableError:
            return
        self._add(unit, graph)

    def unit_for_call(self, method: str, arguments: Arguments) -> Unit:
        """The unit of the whole model's method for one more way of calling it.

        Raises:
            UntraceableError: the method does not trace when it is called so.
        """
        if method == "forward":
            if "" in self.failures:
                raise self.failures[""]
            return Unit("")
        signature = self.tracing.signature("", method)
        call = call_of(signature, arguments.args, arguments.kwargs) if signature else None
        unit = Unit("", len(self.methods("")), method)
        self._add(unit, self._settled(unit, self.tracing.trace("", call, method)))
        return unit

    def _settled(self, unit: Unit, graph: OwnerGraph) -> OwnerGraph:
        """The graph of a unit with all that it may go by of what its children return."""

        def again(returns: Mapping[str, Argument]) -> OwnerGraph:
            return self.tracing.trace(unit.path, graph.call, unit.method, returns)

        return settled(graph, again, partial(self._result, unit), partial(self._is_opaque, unit))

    def _result(self, unit: Unit, node: fx.Node) -> Argument | None:
        """What a call of a child returns, where its graph tells, and is the same in both modes."""
        child = self.child(unit, node)
        module = self.modules[child]
        if self._is_leaf(child) or module._forward_hooks or isinstance(module, nn.MultiheadAttention):
            return result_of_attention(module, node)
        callee = self._enter(child, self._call_of(child, node))
        return result_of(self.graphs[callee]) if callee else None

    def _is_opaque(self, unit: Unit, node: fx.Node) -> bool:
        """Whether a node calls what no graph shows."""
        if node.op == "call_module":
            return self._is_leaf(self.child(unit, node))
        return node.op != "output" and node.target is not operator.getitem

    def _add(self, unit: Unit, graph: OwnerGraph) -> None:
        self.graphs[unit] = graph
        units = self._variants if unit.method == "forward" else self._methods
        units.setdefault(unit.path, []).append(unit)
        for version in filter(None, (graph, graph.in_eval)):
            for node in version.graph.nodes:
                if node.op == "call_module":
                    child = self.child(unit, node)
                    spot = Spot(unit, node)
                    self.callers.setdefault(child, []).append(spot)
                    callee = None if self._is_leaf(child) else self._enter(child, self._call_of(child, node))
                    if callee is not None:
                        self._callees[spot] = callee

    def _mentioned_in_untraced_code(self) -> set[str]:
        """Modules that a forward without a graph may call too: it mentions every attribute on the way to them."""
        found: set[str] = set()
        for path in self.failures:
            names = self.tracing.attribute_names(path, {unit.method for unit in self.methods(path)})
            prefix = f"{path}." if path else ""
            for below in self.modules:
                steps = below.removeprefix(prefix).split(".") if below != path and below.startswith(prefix) else []
                if steps and all(step in names or step.isdigit() for step in steps):
                    found.add(below)
        return found

    def replaces_weights(self, path: str) -> str | None:
        """The path of a forward without a graph around this module that calls modules with other weights than theirs."""
        around = [failed for failed in self.failures if not failed or f"{path}.".startswith(f"{failed}.")]
        return next(filter(self._replaces_weights, around), None)

    def _replaces_weights(self, path: str) -> bool:
        if path not in self._replacing:
            self._replacing[path] = "functional_call" in self.tracing.attribute_names(path, set())
        return self._replacing[path]

    def _call_of(self, path: str, node: fx.Node) -> Call | None:
        """The call of a module that the node makes; those that pass values alone are the same for all of a class."""
        module, passed = self.modules[path], node.args
        plain = not (node.kwargs or is_held(module, "forward")) and all(isinstance(value, fx.Node) for value in passed)
        key = type(module), len(passed)
        if plain and key in self._plain_calls:
            return self._plain_calls[key]
        signature = self.tracing.signature(path)
        call = call_of(signature, passed, node.kwargs) if signature else None
        if plain:
            self._plain_calls[key] = call
        return call

    def _is_leaf(self, path: str) -> bool:
        if path not in self._leaves:
            self._leaves[path] = is_leaf(self.modules[path])
        return self._leaves[path]

    def methods(self, path: str) -> list[Unit]:
        """The traced helper methods of a module whose forward has no graph."""
        return self._methods.get(path, [])

    def child(self, unit: Unit, node: fx.Node) -> str:
        """The path under which the model first names the module that the node calls."""
        path, target = unit.path, str(node.target)
        return self.tracing.names.first_name(f"{path}.{target}" if path else target)

    def path_of(self, module: nn.Module) -> str:
        """The path under which the model first names a module of its own."""
        path = self.tracing.names.module("", module)
        assert path is not None, "a traced graph names only modules of the model"
        return path

    def module(self, spot: Spot) -> nn.Module | None:
        """The child module that the spot calls, if it calls one."""
        return self.modules[self.child(*spot)] if spot.node.op == "call_module" else None

    def callee(self, spot: Spot) -> Unit | None:
        """The unit that the spot calls; None where it is an activation, an affine map or another leaf, or has no graph."""
        unit = self._callees.get(spot)
        if unit is None or self.activation_module(unit.path) or self.look_alike(unit.path):
            return None
        return unit

    def unit_called(self, path: str, call: Call | None) -> Unit | None:
        """The unit of a module that runs for a call; its first one where no graph calls it so."""
        exact = self._calls.get((path, call.key())) if call else None
        return exact or next(iter(self.variants(path)), None)

    def own_unit(self, path: str) -> list[Unit]:
        """The unit of a leaf module's own forward, traced now; empty where it has no graph."""
        try:
            graph = self.tracing.trace(path)
        except UntraceableError as error:
            self.failures[path] = error
            return []
        self._add(Unit(path), graph)
        return self.variants(path)

    def activation(self, spot: Spot) -> str | None:
        """The name of the element-wise activation that the spot calls; None where it calls none."""
        calls_module = spot.node.op == "call_module"
        return self.activation_module(self.child(*spot)) if calls_module else call_activation(spot.node)

    def look_alike(self, path: str) -> Stored | None:
        """How the weight of a module that acts like a Linear is stored; None for other modules."""
        if path not in self._look_alikes:
            module = self.modules[path]
            plain = acts_as(module, type(module)) and may_be_linear(module)
            self._look_alikes[path] = self._tried(module) if plain else None
        return self._look_alikes[path]

    def _tried(self, module: nn.Module) -> Stored | None:
        """Whether it acts like a Linear; modules of one likeness are tried out once, for that takes long."""
        if (alike := likeness(module)) is None:
            return linear_look_alike(module)
        key = type(module), alike
        if key not in self._verdicts:
            self._verdicts[key] = linear_look_alike(module)
        return self._verdicts[key]

    def convolves(self, path: str) -> bool:
        """Whether a convolution with a forward of its own acts like torch's; asked once for all of one geometry."""
        module = self.modules[path]
        if not isinstance(module, _ConvNd) or self.variants(path) or not acts_as(module, type(module)):
            return False
        width = {"in_channels": 0, "out_channels": 0, "groups": module.groups == 1}
        key = (type(module), str({**plain_attributes(module), **width}))
        if key not in self._convolutions:
            self._convolutions[key] = is_convolution(module)
        return self._convolutions[key]

    def activations_in(self, unit: Unit) -> set[str]:
        """The names of the activations that a unit calls."""
        return {name for node in self.graphs[unit].graph.nodes if (name := self.activation(Spot(unit, node)))}

    def activation_module(self, path: str) -> str | None:
        """The name of the activation that a module is; None where it is none."""
        if path not in self._activations:
            self._activations[path] = self._activation_module(path)
        return self._activations[path]

    def _activation_module(self, path: str) -> str | None:
        module = self.modules[path]
        known = module_activation(module)
        if known is not None or module._modules:
            return known
        graphs = [self.graphs[unit].graph for unit in self.variants(path)]
        return elementwise_activation(graphs[0], module) if len(graphs) == 1 else None

    def variants(self, path: str) -> list[Unit]:
        """Every unit of a module."""
        return self._variants.get(path, [])


def _root_call(tracing: Tracing, example_inputs: ExampleInputs | None) -> Call | None:
    signature = tracing.signature("")
    if example_inputs is None or signature is None:
        return None
    return call_of(signature, *arguments_of(example_inputs))
