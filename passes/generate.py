"""Python code from rewritten graphs: a function for every variant and mode, and a dispatcher over them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .calls import Argument, Call, Constant, Items
from .errors import SurgeryError
from .nodes import Verbatim
from .subclass import Code, Rewriter, original_class, subclass


@dataclass(frozen=True, slots=True)
class Variant:
    """A rewritten graph for one way of calling the forward; `in_eval` where eval mode has another."""

    call: Call
    typed: frozenset[str]
    graph: fx.Graph
    in_eval: fx.Graph | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """A rewritten method, or a callable that the instance itself holds (`held`), in all its variants."""

    signature: inspect.Signature
    held: bool
    variants: tuple[Variant, ...]


Watched = Mapping[tuple[str, str], Any]


def generated_class(
    original: type[nn.Module],
    methods: Mapping[str, Method],
    flags: Mapping[str, object],
    watched: Watched,
    rewriter: Rewriter,
) -> type[nn.Module]:
    """A subclass whose methods have the original signatures and run the variant that fits the call.

    `flags` are the attributes that the code was made for, with their fingerprints: the subclass lets no other value in.
    `watched` are the same of its children, by (path, attribute): each call checks that they are what they were.
    `rewriter` is asked to give a module a class that knows one more way of calling a method.
    """
    scope: dict[str, Any] = {}
    sources = [_source(name, method, watched, scope) for name, method in methods.items()]
    held = {name: method.held for name, method in methods.items()}
    return subclass(original, Code(held, "\n\n".join(sources), scope, rewriter, flags))


def _source(method: str, rewritten: Method, watched: Watched, scope: dict[str, Any]) -> str:
    """One function per variant and mode, and a dispatcher over them where there is a choice to make or a check."""
    names, signature, variants = _Names(scope), rewritten.signature, rewritten.variants
    first = list(signature.parameters.values())[1:2]
    required = first[0].name if first and first[0].default is inspect.Parameter.empty else ""
    guards = [names.guards(variant.call, variant.typed, required) for variant in variants]
    if len(variants) == 1 and not guards[0] and variants[0].in_eval is None and not watched:
        return _function(method, variants[0].graph, scope)
    functions: list[str] = []
    lines = [f"def {method}({names.parameters(signature)}):"]
    if watched:
        scope["_refuse_changed"] = _refuse_changed
        same = " and ".join(names.unchanged(where, attribute, value) for (where, attribute), value in watched.items())
        known = ", ".join(f"{where}.{attribute}" for where, attribute in watched)
        lines += [f"    if not ({same}):", f"        _refuse_changed(self, {known!r})"]
    for index, (variant, conditions) in enumerate(zip(variants, guards, strict=True)):
        arguments = ", ".join(["self", *_passed(variant.call)])
        pad = "    "
        if conditions:
            lines.append(f"{pad}if {' and '.join(conditions)}:")
            pad += "    "
        if variant.in_eval is not None:
            functions.append(_function(f"_{method}_in_eval_{index}", variant.in_eval, scope))
            lines += [f"{pad}if not self.training:", f"{pad}    return _{method}_in_eval_{index}({arguments})"]
        functions.append(_function(f"_{method}_{index}", variant.graph, scope))
        lines.append(f"{pad}return _{method}_{index}({arguments})")
    if all(guards):
        scope["_call_in_another_way"] = _call_in_another_way
        args, kwargs = _forwarded(signature)
        lines.append(f"    return _call_in_another_way(self, {method!r}, {args}, {kwargs})")
    return "\n\n".join([*functions, "\n".join(lines) + "\n"])


def _forwarded(signature: inspect.Signature) -> tuple[str, str]:
    """Source of the tuple and the dict that hand a method's arguments on."""
    args: list[str] = []
    kwargs: list[str] = []
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            args.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.append(f"**{parameter.name}")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            kwargs.append(f"{parameter.name!r}: {parameter.name}")
        else:
            args.append(parameter.name)
    return "(" + "".join(f"{name}, " for name in args) + ")", "{" + ", ".join(kwargs) + "}"


def _function(name: str, graph: fx.Graph, scope: dict[str, Any]) -> str:
    code = graph.python_code("self")
    scope |= code.globals
    return code.src.replace("def forward(self", f"def {name}(self", 1).strip("\n") + "\n"


def _call_in_another_way(module: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Have the method rewritten for a call with other optional arguments than seen before, and call it."""
    rewriter = type(module).__dict__["_bypass_rewriter"]
    rewrite = torch.compiler.disable(rewriter)  # type: ignore[no-untyped-call]  # as a decorator, its import is slow
    rewrite(module, method, args, kwargs)
    return getattr(module, method)(*args, **kwargs)


def _refuse_changed(module: nn.Module, known: str) -> None:
    raise SurgeryError(
        f"the forward of this {original_class(module).__name__} was rewritten for what its children said of themselves "
        f"({known}), and one of them says otherwise now: contract the model, set it, and extend again"
    )


def _is_same_data(value: Any, planned: Any) -> bool:
    """Whether a container has the items that it was planned with: other ones may be tensors, which say so item by item."""
    if type(value) is not type(planned):
        return False
    if not isinstance(planned, list | tuple | dict):
        return bool(value == planned)
    if len(value) != len(planned):
        return False
    if isinstance(planned, dict):
        return all(key in value and _is_same_data(value[key], planned[key]) for key in planned)
    return all(map(_is_same_data, value, planned))


class _Names:
    """Names in the generated module for objects that have no source text: defaults, constants, types."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope

    def name(self, value: Any) -> str:
        if value is None or type(value) in (bool, int, str):  # an Enum has no source text
            return repr(value)
        for name, known in self.scope.items():
            if known is value:
                return name
        name = f"_object_{len(self.scope)}"
        self.scope[name] = value
        return name

    def parameters(self, signature: inspect.Signature) -> str:
        plain = [
            p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else Verbatim(self.name(p.default)))
            for p in signature.parameters.values()
        ]
        return str(
            signature.replace(parameters=[plain[0].replace(name="self"), *plain[1:]], return_annotation=signature.empty)
        )[1:-1]

    def unchanged(self, where: str, attribute: str, value: Any) -> str:
        """The condition that a child's attribute is what it was."""
        child = "".join(f"._modules[{step!r}]" for step in where.split("."))
        identical = value is None or not isinstance(value, int | float | str | tuple) or isinstance(value, bool)
        return f"self{child}.{attribute} {'is' if identical else '=='} {self.name(value)}"

    def guards(self, call: Call, typed: frozenset[str], required: str) -> list[str]:
        """Conditions under which a call is this one; the `required` first argument is taken to be there."""
        found = [
            guard for name, argument in call.arguments for guard in self.guard(name, argument, typed, name == required)
        ]
        if call.star is not None:
            star, items = call.star
            found.append(f"len({star}) == {len(items)}")
            found += [
                guard
                for i, item in enumerate(items)
                for guard in self.gathered(f"{star}[{i}]", f"{star}_{i}", item, typed)
            ]
        if call.stars is not None:
            stars, pairs = call.stars
            keys = ", ".join(repr(key) for key, _ in pairs)
            found.append(f"set({stars}) == {{{keys}}}" if pairs else f"not {stars}")
            for key, item in pairs:
                found += self.gathered(f"{stars}[{key!r}]", f"{stars}_{key}", item, typed)
        return found

    def gathered(self, passed: str, name: str, argument: Argument, typed: frozenset[str]) -> list[str]:
        """Conditions on what `*args` or `**kwargs` gathered, by its place in them; a trace has a name for each."""
        return self.guard(passed, argument, frozenset({passed}) if name in typed else frozenset(), False)

    def guard(self, name: str, argument: Argument, typed: frozenset[str], required: bool) -> list[str]:
        if isinstance(argument, Constant):
            if argument.value is None or isinstance(argument.value, bool):
                return [f"{name} is {self.name(argument.value)}"]
            if argument.value and isinstance(argument.value, list | tuple | dict):
                return [f"{self.name(_is_same_data)}({name}, {self.name(argument.value)})"]
            return [f"type({name}) is {self.name(type(argument.value))}", f"{name} == {self.name(argument.value)}"]
        if isinstance(argument, Items):
            keys = ", ".join(self.name(key) for key, _ in argument.items)
            is_dict = argument.container is dict
            same = f"list({name}) == [{keys}]" if is_dict else f"len({name}) == {len(argument.items)}"
            items = [(f"{name}[{self.name(key)}]", inner) for key, inner in argument.items]
            fit = [guard for item, inner in items for guard in self.guard(item, inner, typed, False)]
            return [f"isinstance({name}, {self.name(argument.container)})", same, *fit]
        if name in typed:
            return [f"isinstance({name}, {self.name(argument.container)})"]
        return [] if required else [f"{name} is not None"]


def _passed(call: Call) -> list[str]:
    """The run-time arguments of a variant's function, in the order of its placeholders."""
    passed = [name for name, argument in call.arguments if not isinstance(argument, Constant)]
    if call.star is not None:
        passed += [f"{call.star[0]}[{i}]" for i, item in enumerate(call.star[1]) if not isinstance(item, Constant)]
    if call.stars is not None:
        passed += [f"{call.stars[0]}[{key!r}]" for key, item in call.stars[1] if not isinstance(item, Constant)]
    return passed
