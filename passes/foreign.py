"""Functions that take values or sizes, and that a graph calls as they are: einops', math's and NumPy's, Python's own that
make a number, and torch's own that look into what they take: sequences of different lengths, and masks.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import fx
from torch.nn.utils import rnn
from torch.utils._pytree import tree_leaves

from .source import functions_of, nested

LIBRARIES = ("einops", "math", "numpy")
NUMBERS: dict[str, Callable[..., Any]] = {
    "len": len, "int": int, "float": float, "round": round, "max": max, "min": min,
}  # fmt: skip
_OF_SEQUENCES = (rnn.pack_padded_sequence, rnn.pad_packed_sequence, rnn.pack_sequence, rnn.pad_sequence)
_OF_MASKS = (F._canonical_mask, F._none_or_dtype)  # which torch's own forwards call

Called = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_ABSENT = object()


@contextmanager
def calls_become(called: Called, functions: Iterable[FunctionType]) -> Iterator[None]:
    """While this lasts, `called` answers where one of the functions calls such a function with a traced value."""
    functions = list(functions)
    spaces = {(id(space), name): (space, name, original) for space, name, original in _named(functions)}
    before = {key: space.get(name, _ABSENT) for key, (space, name, _) in spaces.items()}
    try:
        for space, name, original in spaces.values():
            space[name] = _calling(original, called)
        yield
    finally:
        for key, (space, name, _) in spaces.items():
            if before[key] is _ABSENT:
                space.pop(name, None)
            else:
                space[name] = before[key]


def _named(functions: list[FunctionType]) -> Iterator[tuple[dict[str, Any], str, Callable[..., Any]]]:
    """Where the functions find what they name of these functions."""
    yield from ((vars(F), each.__name__, each) for each in _OF_MASKS)
    others = {(id(each.__globals__), name) for each in functions for name in _globals(each)[1]}
    for function in functions:
        names, space = {name for code in nested(function.__code__) for name in code.co_names}, function.__globals__
        yield from ((vars(rnn), each.__name__, each) for each in _OF_SEQUENCES if each.__name__ in names)
        for name in names:
            value = space.get(name, sys.modules.get(name) if name in LIBRARIES else None)  # it may import them itself
            if type(value) is ModuleType and value.__name__ in LIBRARIES:
                inside = {each: vars(value)[each] for each in names if _is_function(vars(value).get(each))}
                yield from ((vars(value), each, function) for each, function in inside.items())
            elif _is_function(value):
                yield space, name, space[name]
        for name in NUMBERS.keys() & _globals(function)[0]:
            if name not in space and (id(space), name) not in others and not _is_compared(name, space):
                yield space, name, NUMBERS[name]


@cache
def _globals(function: FunctionType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a function calls, and those that it takes in another way (`dtype=int`)."""
    called, taken = set[str](), set[str]()
    for code in nested(function.__code__):
        for each in dis.get_instructions(code):
            if each.opname in ("LOAD_GLOBAL", "LOAD_NAME") and each.argval in NUMBERS:
                calls = each.opname == "LOAD_GLOBAL" and (each.arg or 0) & 1
                (called if calls else taken).add(each.argval)
    return frozenset(called), frozenset(taken)


def _is_compared(name: str, space: dict[str, Any]) -> bool:
    """Whether code that shares its names with a forward asks for that very type (`type(x) is int`)."""
    if not isinstance(NUMBERS[name], type):
        return False
    functions = (each for value in [*space.values()] for each in _defined(value, space))
    return any(name in _compared(code) for each in functions for code in nested(each.__code__))


def _defined(value: Any, space: dict[str, Any]) -> Iterator[FunctionType]:
    """The functions that a module defines, those in a class of it too."""
    if isinstance(value, type) and value.__module__ == space.get("__name__"):
        for inner in [*vars(value).values()]:
            yield from _defined(inner, space)
    elif isinstance(value, FunctionType | staticmethod | classmethod | property):
        yield from (each for each in functions_of(value) if each.__globals__ is space)


@cache
def _compared(code: CodeType) -> frozenset[str]:
    """What a code asks to be one and the same as something."""
    if NUMBERS.keys().isdisjoint(code.co_names):
        return frozenset()
    names = (each.argval for each, after in pairwise(dis.get_instructions(code)) if after.opname == "IS_OP")
    return frozenset(name for name in names if isinstance(name, str))


def _is_function(value: Any) -> bool:
    """Whether it is one of the functions."""
    if any(value is each for each in _OF_SEQUENCES):
        return True
    library = str(getattr(value, "__module__", "")).split(".")[0]
    return library in LIBRARIES and not isinstance(value, type) and callable(value)


def _calling(original: Callable[..., Any], called: Called) -> Callable[..., Any]:
    own, several = original in NUMBERS.values(), original in (max, min)

    def calling(*args: Any, **kwargs: Any) -> Any:
        leaves = args[: len(args) if several else 1] if own else tree_leaves((args, kwargs))  # a list has a length
        if several and (kwargs or len(args) == 1):
            leaves = ()  # of what it runs over, or compares by a function, Python finds the largest
        traced = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
        return called(original, args, kwargs) if traced else original(*args, **kwargs)

    if not isinstance(original, type):  # other code may use what it has beside: `np.add.reduce`
        vars(calling).update({name: getattr(original, name) for name in dir(original) if not name.startswith("_")})
        return calling
    return _StandIn(original.__name__, (), {"original": original, "calling": staticmethod(calling)})


class _StandIn(type):
    """The type of what stands for a type: other code that shares its name may ask what is an instance of it."""

    original: type
    calling: Callable[..., Any]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.calling(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.original)
