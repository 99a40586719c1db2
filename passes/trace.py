"""Owner-local tracing: one module's own forward as a small fx.Graph, with every child module a leaf.

Tracing one forward at a time reaches modules that whole-model tracing does not, and it keeps the model's modules, hooks
and methods as they are. What the forward read from its modules while it was traced (flags, sizes, callables) is
recorded: a second module of the class shares the graph where it reads the same.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from .branches import Answers, RaisesError, over_answers
from .callables import Function, function_of, is_callable_attribute, signature_of
from .calls import NONE_KNOWN, Call, Forward, Returns, default_call
from .errors import UntraceableError
from .held import Held, held_code, names_in, reached_through
from .names import ModelNames
from .nodes import same_code
from .reads import MISSING, TENSOR, Read, fingerprint, inherited
from .recording import Recorder, read_plainly
from .set_attributes import names_set, refuse_change, refuse_memory
from .source import activations_below, activations_in, activations_named, codes, mapped_by, reached, trap
from .splice import AxesError, Sizes, joined
from .tracer import OwnerTracer
from .watchers import watches


class OwnerGraph:
    """The graph of one owner's forward for one way of calling it, shared by all modules that read the same.

    Attributes:
        graph: the fx.Graph (in training mode, where the modes differ); child calls are `call_module` nodes with paths
            relative to the owner.
        call: the arguments it was traced for.
        reads: (module path, attribute, fingerprint) of everything that the forward read.
        typed: arguments whose Python type the forward asked for.
        in_eval: the graph in eval mode where it differs, else None.
    """

    def __init__(
        self,
        graph: fx.Graph,
        call: Call,
        reads: tuple[Read, ...],
        typed: frozenset[str],
        in_eval: OwnerGraph | None = None,
    ) -> None:
        self.graph, self.call, self.reads, self.typed, self.in_eval = graph, call, reads, typed, in_eval

    @cached_property
    def names(self) -> dict[str, fx.Node]:
        """Every call by its local name: the child's path, or the function's name, with _1, _2, … for further calls."""
        taken: dict[str, fx.Node] = {}
        counts: dict[tuple[str, bool], int] = {}  # how far each name is taken: a loop may hold thousands of one
        children = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        for node in self.graph.nodes:
            if node.op not in ("call_module", "call_function", "call_method"):
                continue
            base = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
            key = base, node.op == "call_module"
            count = counts.get(key, 0)
            name = f"{base}_{count}" if count else base
            while name in taken or (name in children and node.op != "call_module"):
                count += 1
                name = f"{base}_{count}"
            taken[name], counts[key] = node, count
        return taken

    @cached_property
    def name_of(self) -> dict[fx.Node, str]:
        """The local name of every call."""
        return {node: name for name, node in self.names.items()}

    @property
    def versions(self) -> tuple[fx.Graph, fx.Graph]:
        """The graphs in training and in eval mode."""
        return self.graph, self.in_eval.graph if self.in_eval else self.graph

    @cached_property
    def same_calls(self) -> bool:
        """Whether the graph in eval mode makes the same calls in the same order, whatever their arguments."""
        here, there = ([(node.op, node.target) for node in graph.nodes] for graph in self.versions)
        return here == there

    @cached_property
    def output(self) -> Any:
        """What the forward returns, as fx arguments."""
        return next(iter(reversed(self.graph.nodes))).args[0]

    @cached_property
    def children(self) -> tuple[str, ...]:
        """The child modules that the graph calls."""
        return tuple(dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "call_module"))


@dataclass(slots=True)
class Noted:
    """What the traces of one forward read and set, and of which arguments they asked for the Python type."""

    reads: dict[Read, None] = field(default_factory=dict)
    sets: set[str] = field(default_factory=set)
    typed: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Walk:
    """What a method may run: its functions, those `through` what its module holds among them, and why it can't be traced
    (None where it can).
    """

    functions: list[FunctionType]
    through: Held
    why: str | None


class Tracing:
    """Traces the forwards of one model's modules, each distinct one once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = ModelNames(model)
        self.modules = self.names.first
        classes = {type(module) for module in self.modules.values()}
        self._recorder = Recorder(classes)
        self._plain = read_plainly(classes)
        self._graphs: dict[tuple[Any, ...], list[OwnerGraph]] = {}
        self._failures: dict[tuple[Any, ...], list[tuple[tuple[Read, ...], str]]] = {}
        self._of_classes: dict[tuple[type[nn.Module], str], Function] = {}
        self._walked: dict[tuple[Any, ...], Walk] = {}

    def session(self) -> AbstractContextManager[None]:
        """Keep the hooks that tracing needs in place: many traces in one session are faster."""
        return self._recorder.installed()

    def signature(self, path: str, method: str = "forward") -> inspect.Signature | None:
        """The signature of a module's method, `self` included; None where it is not plain Python code."""
        module = self.modules[path]
        return None if isinstance(module, torch.jit.ScriptModule) else signature_of(self._function(module, method))

    def _function(self, module: nn.Module, name: str) -> Function:
        """What a call of `module.name` runs; what a class says of it is looked up once."""
        if name in module.__dict__:
            return function_of(module, name)
        key = type(module), name
        if key not in self._of_classes:
            self._of_classes[key] = function_of(module, name)
        return self._of_classes[key]

    def trace(
        self, path: str, call: Call | None = None, method: str = "forward", returns: Returns = NONE_KNOWN
    ) -> OwnerGraph:
        """The graph of a method of the module at `path`, called as `call` says (as its defaults say, if None).

        `returns` says what calls of its children return, by their paths, where that is more than a value.

        Raises:
            UntraceableError: the method can't be written down as a graph; the message says why.
        """
        module, signature = self.modules[path], self.signature(path, method)
        where = f"{path or 'the model'} ({type(module).__name__})"
        if signature is None:
            raise UntraceableError(f"{where}: its forward is not plain Python code")
        call = call or default_call(signature)
        held = fingerprint(module.__dict__.get(method), self.names, path)
        key = (type(module), method, call.key(), held, self.names.aliases(path), str(sorted(returns.items())))
        for known in reversed(self._graphs.get(key, ())):  # equal blocks follow each other
            if self._read_same(path, known.reads) and self._resolves(path, known):
                return known
        for reads, reason in self._failures.get(key, ()):
            if self._read_same(path, reads):
                raise UntraceableError(f"{where}: {reason}")
        noted = Noted()
        try:
            function = self._function(module, method)
            walk = self._walk(function, module)
            if walk.why is not None:
                raise UntraceableError(walk.why)
            traced = self._trace(Forward(path, function, walk.functions, signature, call, returns), noted)
        except UntraceableError as error:
            self._failures.setdefault(key, []).append((tuple(noted.reads), str(error)))
            raise UntraceableError(f"{where}: {error}") from error
        self._graphs.setdefault(key, []).append(traced)
        return traced

    def _walk(self, function: Function, module: nn.Module) -> Walk:
        """What a method of a module may run, and why it can't be traced: looked up once for all that hold the same."""
        cls = type(module)
        key: tuple[Any, ...] = (function, cls)
        if key not in self._walked:
            functions = reached(function, cls)
            self._walked[key] = Walk(functions, Held(), trap(function, functions))
        plain, held = self._walked[key], held_code(module)
        if not held or not any(held.keys() & names_in(each) for each in plain.functions):
            return plain
        key += tuple((name, id(value)) for name, value in held.items())
        if key not in self._walked:
            through = reached_through(held, plain.functions, cls)
            functions = [*plain.functions, *through.functions]
            self._walked[key] = Walk(functions, through, plain.why or trap(function, functions))
        return self._walked[key]

    def functions(self) -> set[FunctionType]:
        """The Python functions that the forwards of the model's modules may run."""
        modules = [module for module in self.modules.values() if not isinstance(module, torch.jit.ScriptModule)]
        walks = [self._walk(self._function(module, "forward"), module) for module in modules]
        return set().union(*(walk.functions for walk in {id(walk): walk for walk in walks}.values()))

    def methods(self, path: str) -> list[str]:
        """The methods that a module's forward calls, at any depth, of classes below torch.nn.Module."""
        module = self.modules[path]
        cls = type(module)
        found: dict[str, None] = {}
        todo = ["forward"]
        while todo:
            for code in codes(function_of(module, todo.pop())):
                for name in code.co_names:
                    method = inspect.getattr_static(cls, name, None)
                    own = isinstance(method, FunctionType) and not hasattr(nn.Module, name)
                    if own and name not in found and name not in module.__dict__:
                        found[name] = None
                        todo.append(name)
        return list(found)

    def attribute_names(self, path: str, traced: set[str]) -> set[str]:
        """The names that a module's forward and those of its helper methods that are not `traced` mention."""
        module = self.modules[path]
        untraced = [name for name in ("forward", *self.methods(path)) if name not in traced]
        mentioning = [code for name in untraced for code in codes(function_of(module, name))]
        return {name for code in mentioning for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}

    def callable_attributes(self, path: str, traced: set[str]) -> list[str]:
        """The callables that a module holds and that its forward, or a helper method that is not `traced`, mentions."""
        module = self.modules[path]
        return sorted(n for n in self.attribute_names(path, traced) if is_callable_attribute(module, n))

    def mentions(self, path: str) -> list[str]:
        """The activations that an untraceable forward names, or a function that it may run."""
        module = self.modules[path]
        found: dict[str, None] = {}
        for name in ("forward", *self.callable_attributes(path, set())):
            function = function_of(module, name)
            found |= dict.fromkeys(activations_in(inspect.unwrap(function)))
            functions = reached(function, type(module))
            functions += [each for mapped in mapped_by(functions) for each in reached(mapped, type(module))]
            found |= dict.fromkeys(activations_named(functions, type(module)))
        held = [module.__dict__.get(name) for name in self.attribute_names(path, set())]
        for value in held:
            found |= dict.fromkeys(activations_in(value) if isinstance(value, dict | list | tuple) else ())
        return list(found)

    def held_mentions(self, path: str, traced: set[str]) -> dict[str, str]:
        """The activations in what an untraceable forward calls of the callables and objects that its module holds, but for
        the attributes that are `traced`: each with where it stands.
        """
        module = self.modules[path]
        through = self._walk(self._function(module, "forward"), module).through
        found: dict[str, str] = {}
        for function, attribute in through.functions.items():
            for activation in activations_named([function], type(module)) if attribute not in traced else ():
                found.setdefault(activation, f"`{function.__qualname__}`, reached through `{attribute}`")
        for value, attribute in through.values.values():
            foreign = isinstance(value, nn.Module) and self.names.module("", value) is None
            known = activations_below(value) if foreign else activations_in(value)
            for activation in known if attribute not in traced else ():
                found.setdefault(activation, f"what `{attribute}` holds")
        return found

    def _trace(self, forward: Forward, noted: Noted) -> OwnerGraph:
        module, call = self.modules[forward.path], forward.call
        graph = self._graph(forward, noted)
        asked = {where for where, name, _ in noted.reads if name == "training"}
        if not asked:
            return OwnerGraph(graph, call, tuple(noted.reads), frozenset(noted.typed))
        now = module.training
        modules = [module_at(module, where) for where in asked]
        if any(other.training != now for other in modules):
            raise UntraceableError("it is in another mode (training or eval) than a child whose mode its forward reads")
        for each in modules:
            each.__dict__["training"] = not now
        try:
            other = self._graph(forward, noted)
        finally:
            for each in modules:
                each.__dict__["training"] = now
        reads = tuple(read for read in noted.reads if read[1] != "training")
        typed = frozenset(noted.typed)
        in_training, in_eval = (graph, other) if now else (other, graph)
        if same_code(in_training, in_eval):
            return OwnerGraph(in_training, call, reads, typed)
        return OwnerGraph(in_training, call, reads, typed, OwnerGraph(in_eval, call, reads, typed))

    def _graph(self, forward: Forward, noted: Noted) -> fx.Graph:
        """The graph of a run; where it asks for traced values that of several, for all answers, and where it runs over the
        items of sizes for several numbers of axes. Where it goes by that number, or only raises an error with the numbers
        that are tried (`assert len(x.shape) == 1`), `len` of a size is left to each call.
        """
        counted = True

        def run(axes: tuple[int, ...], answers: Answers) -> OwnerTracer:
            module = self.modules[forward.path]
            other = OwnerTracer(self.names, self._recorder, module, forward, axes, answers, counted)
            try:
                other.run()
            except RaisesError as error:
                other.raised = error
            finally:
                noted.reads |= other.reads
                noted.typed |= other.typed
                noted.sets |= other.set.names
            return other

        def answered(answers: Answers) -> tuple[fx.Graph | RaisesError, int]:
            first = run((), answers)
            asked = len(first.questions.asked)
            if first.set.constants:
                refuse_change(first.set.constants, run((), answers).set.constants)

            def over(axes: tuple[int, ...]) -> tuple[fx.Graph, Sizes]:
                other = run(axes, answers)
                if other.raised is not None:
                    raise other.raised
                if len(other.questions.asked) != asked:
                    raise AxesError
                return other.graph, other.sizes

            graph = joined(first.sizes, over) if first.sizes.met and first.raised is None else first.graph
            return first.raised or graph, asked

        try:
            graph = over_answers(answered)
        except (AxesError, RaisesError):
            counted = False
            graph = over_answers(answered)
        refuse_memory(noted.reads, noted.sets)
        return graph

    def _read_same(self, path: str, reads: tuple[Read, ...]) -> bool:
        module = self.modules[path]
        at: dict[str, nn.Module] = {}
        try:
            for where, name, noted in reads:
                if where not in at:
                    at[where] = module_at(module, where)
                found = self._look(path, at[where], name)
                if found != noted and not (noted == TENSOR and found[:1] == TENSOR):
                    return False
        except AttributeError:
            return False
        return True

    def _look(self, owner: str, module: nn.Module, name: str) -> tuple[Any, ...]:
        """The fingerprint that the owner's read of the attribute would leave now."""
        own, cls = module.__dict__, type(module)
        for held in (own, own["_parameters"], own["_buffers"], own["_modules"]):
            if name in held:
                direct = self._plain and not hasattr(cls, name)
                return fingerprint(held[name] if direct else getattr(module, name), self.names, owner)
        return inherited(getattr(cls, name), self.names, owner) if hasattr(cls, name) else MISSING

    def _resolves(self, path: str, known: OwnerGraph) -> bool:
        """Whether every child that the graph names is, here too, known by that name first (children may be shared)."""
        module, prefix = self.modules[path], f"{path}." if path else ""
        try:
            children = {target: module_at(module, target) for target in known.children}
            first = (f"{prefix}{to}" in self.modules or self.names.module(path, children[to]) == to for to in children)
            return all(first) and not (
                names_set(known.versions) and any(watches(each, module) for each in children.values())
            )
        except AttributeError:
            return False


def module_at(module: nn.Module, path: str) -> nn.Module:
    """The module at a path below another; as get_submodule, but past what modules do when attributes are read."""
    for step in path.split(".") if path else ():
        child = module._modules.get(step)
        if child is None:
            raise AttributeError(f"{type(module).__name__} has no module {step!r}")
        module = child
    return module
