"""Insertion: ψ is written into the owner's graph, and the owner's class is swapped for a subclass that runs it.

The subclass is generated once for every (original class, rewritten code), so equal blocks share one class and one
compiled region. Nothing of a model is touched before every owner's code is generated.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import is_not
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .activations import activation_input, works_in_place
from .calls import Argument, Call, Constant, Items
from .errors import PlanError, SurgeryError
from .link import Linked, Spot, Unit
from .lint import check_rewritten
from .matrices import tensor_named
from .plan import Plan, Site
from .trace import OwnerGraph

Psi = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Edit:
    """What will happen to one owner: its new class, and the δ it gets for each site."""

    owner: nn.Module
    extended: type[nn.Module]
    deltas: tuple[tuple[str, nn.Parameter], ...]


def prepare(linked: Linked, plan: Plan, psi: Psi) -> list[Edit]:
    """Generate the code for every owner of the plan; the model is not touched.

    Raises:
        PlanError: a site of the plan does not exist in this model; the message names it.
    """
    owners: dict[str, list[Site]] = {}
    for site in plan.sites:
        owners.setdefault(site.owner, []).append(site)
    edits = []
    for path, sites in owners.items():
        units = linked.variants(path) if path in linked.modules else []
        units = units or (linked.own_unit(path) if path in linked.modules else [])
        if not units:
            raise PlanError(
                f"{sites[0].name}: the model has no module {path!r} with a forward that traces; plan this model anew"
            )
        module = linked.modules[path]
        extended = _extended_class(linked, module, units, sites, psi)
        edits.append(Edit(module, extended, tuple((site.delta, _new_delta(linked, site)) for site in sites)))
    return edits


def apply(edits: Iterable[Edit]) -> None:
    """Swap the classes and register the parameters."""
    for edit in edits:
        for name, delta in edit.deltas:
            edit.owner.register_parameter(name, delta)
        edit.owner.__class__ = edit.extended


def restore(owner: nn.Module, deltas: Iterable[str]) -> None:
    """Give an owner its original class back and drop its δ."""
    owner.__class__ = original_class(owner)
    for name in deltas:
        owner._parameters.pop(name, None)


def is_extended_owner(module: nn.Module) -> bool:
    """Whether the module's class is one that insertion generated."""
    return "_bypass_original" in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before the insertion."""
    return cast(type[nn.Module], type(module).__dict__["_bypass_original"])


def rewritten_code(module: nn.Module) -> str:
    """The source of an extended owner's forward, as it was generated."""
    return cast(str, type(module).__dict__["_bypass_source"])


def _new_delta(linked: Linked, site: Site) -> nn.Parameter:
    """δ = 0 on the owner's device; float32 where the model is in half precision, whose steps are too small for δ."""
    near: list[Tensor] = [tensor_named(linked.model, site.first.weight)] if site.first else []
    near += [*linked.modules[site.owner].parameters(), *linked.model.parameters()]
    like = next((parameter for parameter in near if parameter.is_floating_point()), torch.empty(0))
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return nn.Parameter(torch.zeros(site.width, dtype=dtype, device=like.device))


def _extended_class(
    linked: Linked, module: nn.Module, units: list[Unit], sites: list[Site], psi: Psi
) -> type[nn.Module]:
    bodies: list[tuple[Call, OwnerGraph, dict[bool | None, fx.Graph]]] = []
    for unit in units:
        owned = linked.graphs[unit]
        versions: dict[bool | None, fx.Graph] = {}
        if owned.in_eval is None:
            versions[None] = _rewrite(linked, unit, owned, sites, psi)
        else:
            versions[True] = _rewrite(linked, unit, owned, sites, psi)
            versions[False] = _rewrite(linked, unit, owned.in_eval, sites, psi)
        bodies.append((owned.call, owned, versions))
    signature = linked.tracing.signature(units[0].path)
    assert signature is not None, "a unit's forward has a signature"
    source, scope = _module_source(signature, bodies)
    original = type(module)
    key = (original, source, tuple(sorted((name, id(value)) for name, value in scope.items())))
    if key not in _classes:
        _classes[key] = _new_class(original, source, scope)
    return _classes[key]


def _rewrite(linked: Linked, unit: Unit, owned: OwnerGraph, sites: list[Site], psi: Psi) -> fx.Graph:
    """A copy of the graph with ψ(z) = σ(z) + D z in the place of every site's σ(z)."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(owned.graph, copies))
    for site in sites:
        node = owned.names.get(site.call)
        z = activation_input(node) if node is not None else None
        if node is None or z is None or linked.activation(Spot(unit, node)) is None:
            raise PlanError(
                f"{site.name}: {site.owner or 'the model'} calls no activation {site.call!r}; plan this model anew"
            )
        sigma, kept = copies[node], copies[z]
        if works_in_place(node, linked.module(Spot(unit, node))) or _overwritten_later(node, z):
            with graph.inserting_before(sigma):
                kept = graph.call_function(torch.clone, (kept,))
        with graph.inserting_after(sigma):
            delta = graph.get_attr(site.delta)
        with graph.inserting_after(delta):
            bypassed = graph.call_function(psi, (sigma, kept, delta, site.channel_dim))
        sigma.replace_all_uses_with(bypassed, delete_user_cb=partial(is_not, bypassed))
    check_rewritten(owned.graph, graph, {copies[owned.names[site.call]] for site in sites}, psi)
    return graph


def _overwritten_later(node: fx.Node, z: fx.Node) -> bool:
    """Whether something else overwrites z, which ψ's backward still needs."""
    for user in z.users:
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        changes = (
            (name.endswith("_") and not name.endswith("__"))
            or name in _IN_PLACE_OPERATORS
            or bool(user.kwargs.get("inplace"))
        )
        if user is not node and user.args and user.args[0] is z and changes and user.op != "call_module":
            return True
    return False


_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ipow", "setitem"}


def _module_source(
    signature: inspect.Signature, bodies: list[tuple[Call, OwnerGraph, dict[bool | None, fx.Graph]]]
) -> tuple[str, dict[str, Any]]:
    """Source of the forward: one function per variant, and a dispatcher with the original signature over them."""
    scope: dict[str, Any] = {}
    parts: list[str] = []
    names = _Names(scope)
    (call, owned, versions), *more = bodies
    if not more and None in versions and not names.guards(call, owned.typed):
        code = versions[None].python_code("self")
        return code.src.strip("\n") + "\n", dict(code.globals)
    for index, (_, _, versions) in enumerate(bodies):
        for mode, graph in versions.items():
            code = graph.python_code("self")
            scope |= code.globals
            parts.append(code.src.replace("def forward(self", f"def {_function(index, mode)}(self", 1).strip("\n"))
    lines = [f"def forward({names.parameters(signature)}):"]
    for index, (call, owned, versions) in enumerate(bodies):
        arguments = ", ".join(["self", *_passed(call)])
        guards = names.guards(call, owned.typed)
        pad = "    "
        if guards:
            lines.append(f"{pad}if {' and '.join(guards)}:")
            pad += "    "
        if None in versions:
            lines.append(f"{pad}return {_function(index, None)}({arguments})")
        else:
            lines.append(f"{pad}if self.training:")
            lines.append(f"{pad}    return {_function(index, True)}({arguments})")
            lines.append(f"{pad}return {_function(index, False)}({arguments})")
    if any(names.guards(call, owned.typed) for call, owned, _ in bodies):
        scope["_unplanned_call"] = _unplanned_call
        lines.append("    _unplanned_call(self)")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n", scope


def _unplanned_call(module: nn.Module) -> None:
    raise SurgeryError(
        f"{original_class(module).__name__}.forward is called with other optional arguments than when the model was "
        "extended: contract the model, and pass example_inputs that call it this way to extend"
    )


def _function(index: int, mode: bool | None) -> str:
    return f"_forward_{index}" + {None: "", True: "_train", False: "_eval"}[mode]


class _Names:
    """Names in the generated module for objects that have no source text: defaults, constants, types."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope

    def name(self, value: Any) -> str:
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        for name, known in self.scope.items():
            if known is value:
                return name
        name = f"_object_{len(self.scope)}"
        self.scope[name] = value
        return name

    def parameters(self, signature: inspect.Signature) -> str:
        plain = [
            p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Text(self.name(p.default)))
            for p in signature.parameters.values()
        ]
        return str(
            signature.replace(parameters=[plain[0].replace(name="self"), *plain[1:]], return_annotation=signature.empty)
        )[1:-1]

    def guards(self, call: Call, typed: frozenset[str]) -> list[str]:
        found = [guard for name, argument in call.arguments[1:] for guard in self.guard(name, argument, typed)]
        found += [
            guard for name, argument in call.arguments[:1] for guard in self.guard(name, argument, typed, first=True)
        ]
        if call.star is not None:
            found.append(f"len({call.star[0]}) == {len(call.star[1])}")
        if call.stars is not None:
            found.append(
                f"set({call.stars[0]}) == {{{', '.join(repr(key) for key, _ in call.stars[1])}}}"
                if call.stars[1]
                else f"not {call.stars[0]}"
            )
        return found

    def guard(self, name: str, argument: Argument, typed: frozenset[str], first: bool = False) -> list[str]:
        if isinstance(argument, Constant):
            by_identity = argument.value is None or isinstance(argument.value, bool)
            return [f"{name} {'is' if by_identity else '=='} {self.name(argument.value)}"]
        if isinstance(argument, Items):
            is_dict = argument.container is dict
            same = f"list({name}) == {list(argument.keys)!r}" if is_dict else f"len({name}) == {len(argument.keys)}"
            return [f"isinstance({name}, {self.name(argument.container)})", same]
        if name in typed:
            return [f"isinstance({name}, {self.name(argument.container)})"]
        return [] if first else [f"{name} is not None"]


class _Text:
    """Prints as itself, so that a default appears in the signature by name."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _passed(call: Call) -> list[str]:
    """The run-time arguments of a variant's function, in the order of its placeholders."""
    passed = [name for name, argument in call.arguments if not isinstance(argument, Constant)]
    if call.star is not None:
        passed += [f"{call.star[0]}[{i}]" for i, item in enumerate(call.star[1]) if not isinstance(item, Constant)]
    if call.stars is not None:
        passed += [f"{call.stars[0]}[{key!r}]" for key, item in call.stars[1] if not isinstance(item, Constant)]
    return passed


def _new_class(original: type[nn.Module], source: str, scope: dict[str, Any]) -> type[nn.Module]:
    filename = f"<bypass_fx {original.__qualname__} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(scope)
    exec(compile(source, filename, "exec"), namespace)
    forward = namespace["forward"]
    forward.__doc__ = original.forward.__doc__
    body = {
        "forward": forward,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__getstate__": _refuse_pickling,
        "_bypass_original": original,
        "_bypass_source": source,
    }
    if not hasattr(original, "__deepcopy__"):
        body["__deepcopy__"] = _deepcopy
    return type(f"Bypass{original.__name__}", (original,), body)


def _refuse_pickling(module: nn.Module) -> None:
    raise SurgeryError(
        f"an extended {original_class(module).__name__} can't be pickled: save its state_dict(), or contract it first"
    )


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    replica = module.__new__(type(module))
    memo[id(module)] = replica
    replica.__dict__ = copy.deepcopy(module.__dict__, memo)
    return replica
