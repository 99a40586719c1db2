"""The code of what a module holds and its forward may call: functions, and objects that are no modules.

A forward reaches such an object by the attributes that it names, through lists, dicts and other objects too; a call of
it runs its class's `__call__`, and the methods that the code mentions.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from .reads import OF_EVERY_MODULE
from .source import functions_of, is_left_out, nested, reached

_FARTHEST = 200  # objects, and functions of theirs, that are looked at for one forward
_LONGEST = 64  # items of a container that are looked at
_CONTAINERS = (dict, list, tuple, set, deque)
_CODELESS = (bool, int, float, complex, str, bytes, type(None), Tensor, ModuleType)


@dataclass(frozen=True, slots=True)
class Held:
    """What a forward may reach of what its module holds, with the attribute that it goes through.

    Attributes:
        functions: the Python functions that it may run.
        values: the callables, and the modules, that it comes across, by identity.
    """

    functions: dict[FunctionType, str] = field(default_factory=dict)
    values: dict[int, tuple[Any, str]] = field(default_factory=dict)


def held_code(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module's own that may hold code; its children are none of them."""
    own = module.__dict__
    return {name: own[name] for name in own if name not in OF_EVERY_MODULE and _may_hold_code(own[name])}


def reached_through(attributes: Mapping[str, Any], functions: Iterable[FunctionType], cls: type[nn.Module]) -> Held:
    """What these functions of a module, which holds these attributes, may run of them, and what that runs in turn."""
    found = Held()
    known = dict.fromkeys(functions)
    names = frozenset[str]().union(*map(names_in, known))
    more = True
    while more and len(found.functions) < _FARTHEST:
        new: dict[FunctionType, str] = {}
        for attribute in filter(names.__contains__, attributes):
            for function in _look(found, attribute, attributes[attribute], names):
                new.setdefault(function, attribute)
        more = False
        for function, attribute in new.items():
            for each in reached(function, cls) if function not in found.functions else ():
                if each not in known and each not in found.functions:
                    found.functions[each], more = attribute, True
        names = names.union(*map(names_in, found.functions))
    return found


@cache
def names_in(function: FunctionType) -> frozenset[str]:
    """The names of globals and attributes that a function mentions."""
    return frozenset(name for code in nested(function.__code__) for name in code.co_names)


def _look(found: Held, attribute: str, value: Any, names: frozenset[str]) -> list[FunctionType]:
    """Go through a value and what it holds under these names; the answer is their functions."""
    todo, seen = [value], set[int]()
    functions: list[FunctionType] = []
    while todo and len(seen) < _FARTHEST:
        here = todo.pop()
        if isinstance(here, _CODELESS) or id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, _CONTAINERS):
            todo += _items(here)
        elif isinstance(here, partial):
            todo += (here.func, *here.args, *here.keywords.values())
        elif isinstance(here, MethodType):
            functions += functions_of(here)
            todo.append(here.__self__)
        elif isinstance(here, nn.Module | type | FunctionType | BuiltinFunctionType) or is_left_out(type(here)):
            found.values.setdefault(id(here), (here, attribute))
            functions += functions_of(here)
        else:
            functions += functions_of(here)
            todo += [held for name, held in getattr(here, "__dict__", {}).items() if name in names]
            for held in _inherited(here, names):
                own = functions_of(held)
                functions += own
                todo += [] if own else [held]
    return functions


def _inherited(thing: Any, names: frozenset[str]) -> Iterator[Any]:
    """What an object has from its class, and in its slots, under these names."""
    cls = type(thing)
    for name in sorted({name for base in cls.__mro__[:-1] for name in vars(base)} & names):
        held = inspect.getattr_static(cls, name)
        yield getattr(thing, name, None) if isinstance(held, MemberDescriptorType) else held


def _items(container: Any) -> list[Any]:
    kind: Any = next(each for each in _CONTAINERS if isinstance(container, each))  # a class below it may do otherwise
    if kind.__len__(container) > _LONGEST:
        return []
    return list(kind.values(container) if kind is dict else kind.__iter__(container))


def _may_hold_code(value: Any, depth: int = 0) -> bool:
    if isinstance(value, _CODELESS):
        return False
    if isinstance(value, _CONTAINERS):
        return depth < 3 and any(_may_hold_code(item, depth + 1) for item in _items(value))
    return callable(value) or not is_left_out(type(value))
