"""How a forward is called: which arguments carry values and which are constants that its code may branch on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType, MappingProxyType
from typing import Any

from torch import Tensor, fx

from .callables import Function


@dataclass(frozen=True, slots=True)
class Value:
    """An argument that carries a run-time value; `container` is the Python type it arrives in."""

    container: type = Tensor


@dataclass(frozen=True, slots=True)
class Constant:
    """An argument that is the same plain Python value in every call."""

    value: Any

    def holds(self, other: Any) -> bool:
        """Whether another value is this constant."""
        return other is self.value or (type(other) is type(self.value) and bool(other == self.value))


@dataclass(frozen=True, slots=True)
class Items:
    """An argument that is a list, tuple or dict with run-time values in it: each item by its key."""

    container: type
    items: tuple[tuple[Any, Argument], ...]


Argument = Value | Constant | Items


@dataclass(frozen=True)
class Call:
    """One way of calling a forward: every parameter by name; `*args` and `**kwargs` hold what they gather."""

    arguments: tuple[tuple[str, Argument], ...]
    star: tuple[str, tuple[Argument, ...]] | None = None
    stars: tuple[str, tuple[tuple[str, Argument], ...]] | None = None

    def key(self) -> str:
        """Text that is equal for equal calls (constants need not be hashable)."""
        return self._text

    @cached_property
    def _text(self) -> str:
        return repr(self)

    def covers(self, other: Call) -> bool:
        """Whether another call of the same forward differs only in plain data where this one takes any value."""
        pairs = zip(self.arguments, other.arguments, strict=True)
        fit = all(mine == given or (mine == Value() and _is_data(given)) for (_, mine), (_, given) in pairs)
        return fit and (self.star, self.stars) == (other.star, other.stars)


Returns = Mapping[str, Argument]
NONE_KNOWN: Returns = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Forward:
    """A method of a module, as it is called: what is to be traced.

    Attributes:
        path: the module's.
        function: the method, and `functions`, those that it may run.
        returns: what calls of the module's children return, by their paths, where that is more than a value.
    """

    path: str
    function: Function
    functions: list[FunctionType]
    signature: inspect.Signature
    call: Call
    returns: Returns


def default_call(signature: inspect.Signature) -> Call:
    """The call that passes values for the required parameters and leaves the others at their defaults."""
    names = list(signature.parameters.values())[1:]
    required = {
        p.name: Value() for p in names if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    star = (Value(),) if not required else ()
    return _call(signature, required, star, {})


def call_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The call that these arguments (fx arguments or run-time ones) make; None where they don't bind."""
    try:
        bound = signature.bind(None, *args, **kwargs).arguments
    except TypeError:
        return None
    given: dict[str, Argument] = {}
    star: tuple[Argument, ...] = ()
    stars: dict[str, Argument] = {}
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.name not in bound:
            continue
        value = bound[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = tuple(argument_of(item) for item in value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            stars = {name: argument_of(item) for name, item in value.items()}
        else:
            given[parameter.name] = argument_of(value)
    return _call(signature, given, star, stars)


def bound_to_placeholders(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by the names of the placeholders that tracing makes for them."""
    bound: dict[str, Any] = {}
    for name, value in signature.bind(None, *args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is kind.VAR_POSITIONAL:
            bound |= {f"{name}_{i}": item for i, item in enumerate(value)}
        elif kind is kind.VAR_KEYWORD:
            bound |= {f"{name}_{key}": item for key, item in value.items()}
        else:
            bound[name] = value
    return bound


def _call(
    signature: inspect.Signature,
    given: Mapping[str, Argument],
    star: tuple[Argument, ...],
    stars: Mapping[str, Argument],
) -> Call:
    arguments: list[tuple[str, Argument]] = []
    gathered: tuple[str, tuple[Argument, ...]] | None = None
    keywords: tuple[str, tuple[tuple[str, Argument], ...]] | None = None
    for parameter in list(signature.parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            gathered = (parameter.name, star)
        elif parameter.kind is parameter.VAR_KEYWORD:
            keywords = (parameter.name, tuple(stars.items()))
        else:
            argument = given.get(parameter.name)
            arguments.append((parameter.name, argument or argument_of(parameter.default)))
    return Call(tuple(arguments), gathered, keywords)


def _is_data(argument: Argument) -> bool:
    return isinstance(argument, Constant) and isinstance(argument.value, bool | int | float | str)


def argument_of(value: Any) -> Argument:
    """A constant for plain data, a value for everything else."""
    if isinstance(value, fx.Node | Tensor):
        return Value()
    if isinstance(value, list | tuple | dict):
        if not any(isinstance(leaf, fx.Node | Tensor) for leaf in leaves(value)):
            return Constant(value)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return Items(plain_type(value), tuple((key, argument_of(item)) for key, item in items))
    plain = value is None or isinstance(value, bool | int | float | str) or type(value).__module__ == "torch"
    return Constant(value) if plain else Value(type(value))


def plain_type(value: Any) -> type:
    """`list` for fx's immutable list, and so on."""
    return next(plain for plain in (list, tuple, dict) if isinstance(value, plain))


def leaves(value: Any) -> Iterator[Any]:
    """The items of nested lists, tuples and dicts."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value
