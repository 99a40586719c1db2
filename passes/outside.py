"""What running a user's code on other than real values must leave as it was: modules, containers and plain objects."""

from __future__ import annotations

import inspect
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper, cache
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

from torch import Tensor, fx, nn

from .source import codes

_LONGEST = 64  # items of a container that are looked into
_DEEPEST = 4  # how deep things in things are kept
# What `keep` would find nothing in: most of what it is asked to keep.
_UNCHANGING = {
    *(type(None), bool, int, float, str, tuple, type),
    *(FunctionType, BuiltinFunctionType, ModuleType, Tensor, nn.Parameter),
}
_ABSENT = object()


class Kept:
    """Shallow copies of things that code may change, so that a change is seen and put back.

    Of a module, its attributes and its registered names are kept; of a container, its items; of any other object, its
    attributes; and of all these the containers and plain objects in them. A function's cache is emptied if it was used.

    Args:
        is_known: whether a module is one of the model's, which are kept where they are read. Of others, which nobody sees
            being read, what they have from their classes is kept too.
    """

    def __init__(self, is_known: Callable[[nn.Module], bool] = lambda module: True) -> None:
        self._is_known = is_known
        self._kept: dict[int, tuple[Any, Any]] = {}

    def keep(self, thing: Any, depth: int = 0) -> None:
        """Keep one thing, where it is one that can change, and what is in it."""
        if type(thing) in _UNCHANGING or id(thing) in self._kept or depth > _DEEPEST:
            return
        if isinstance(thing, _lru_cache_wrapper):
            self._kept[id(thing)] = (thing, thing.cache_info())
        elif isinstance(thing, dict | list | set | deque):
            items = _items(thing)
            self._kept[id(thing)] = (thing, items)
            for value in (items.values() if isinstance(thing, dict) else items) if len(items) <= _LONGEST else ():
                self.keep(value, depth + 1)
        elif isinstance(thing, nn.Module) or is_plain_object(thing):
            known = not isinstance(thing, nn.Module) or self._is_known(thing)
            if depth and known and isinstance(thing, nn.Module):
                return
            self._kept[id(thing)] = (thing, _items(thing))
            for value in (*_items(thing).values(), *(() if known else inherited_values(type(thing)))):
                self.keep(value, depth + 1)

    def keep_surroundings(self, function: FunctionType) -> None:
        """Keep what a function may reach by a global name or has closed over."""
        for code in codes(function):
            for name in code.co_names:
                self.keep(function.__globals__.get(name))
        for cell in function.__closure__ or ():
            if cell != CellType():
                self.keep(cell.cell_contents)

    def put_back(self) -> list[Any]:
        """Give everything the contents that it had; the answer is what had others.

        What a descriptor of a module's class puts there for later, such as a cached property, does not count.
        """
        changed: list[Any] = []
        for thing, before in self._kept.values():
            if isinstance(thing, _lru_cache_wrapper):
                if thing.cache_info() != before:
                    thing.cache_clear()  # it may hold what is no real value
                continue
            if not _same(_held(thing), before):
                if not isinstance(thing, nn.Module) or not _caches(type(thing), _held(thing), before):
                    changed.append(thing)
                _refill(thing, before)
        return changed


def inherited_values(cls: type) -> Iterator[Any]:
    """What a class holds, and what those of its bases do that are not torch's."""
    for each in cls.__mro__:
        if each.__module__.split(".")[0] not in ("torch", "builtins"):
            yield from vars(each).values()


def is_plain_object(thing: Any) -> bool:
    """Whether a thing is of a class that is neither torch's nor Python's, and keeps its attributes in a dict."""
    if issubclass(type(thing), fx.Proxy):
        return False  # a value of the trace: it leads to the tracer, and so to what is kept
    library = type(thing).__module__.split(".")[0]
    own = not isinstance(thing, type) and library not in ("torch", "builtins", "numpy", "functools")
    return own and (isinstance(getattr(thing, "__dict__", None), dict) or bool(_slots(type(thing))))


def _items(thing: Any) -> Any:
    if isinstance(thing, dict):
        return dict(_way(thing).items(thing))
    return list(thing) if isinstance(thing, list | deque | set) else _attributes(thing)


def _held(thing: Any) -> Any:
    """As `_items`, not copied where that is not needed."""
    if isinstance(thing, dict | list | deque | set):
        return thing if type(thing) is dict else _items(thing)
    return _attributes(thing)


def _attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object, in its dict and in its slots."""
    slots = {name: slot.__get__(thing) for name, slot in _slots(type(thing)).items() if hasattr(thing, name)}
    return {**getattr(thing, "__dict__", {}), **slots}


def _slots(cls: type) -> dict[str, MemberDescriptorType]:
    return _slots_along(cls.__mro__)


@cache
def _slots_along(bases: tuple[type, ...]) -> dict[str, MemberDescriptorType]:
    return {
        name: slot
        for base in bases
        if "__slots__" in vars(base)
        for name, slot in vars(base).items()
        if isinstance(slot, MemberDescriptorType)
    }


def _way(thing: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods change a dict past what its own class does then; an OrderedDict keeps an order of its own."""
    return OrderedDict if isinstance(thing, OrderedDict) else dict


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        return len(now) == len(before) and all(now.get(key, _ABSENT) is value for key, value in before.items())
    return len(now) == len(before) and all(one is other for one, other in zip(now, before, strict=True))


def _caches(cls: type, now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether all that is other than before is what a descriptor of the class put there, such as a cached property."""
    others = (name for name in now.keys() | before.keys() if now.get(name, _ABSENT) is not before.get(name, _ABSENT))
    put = ((inspect.getattr_static(cls, name, None), now.get(name)) for name in others)
    return all(hasattr(each, "__get__") and not isinstance(value, fx.Proxy) for each, value in put)


def _refill(thing: Any, before: Any) -> None:
    if isinstance(thing, dict):
        way = _way(thing)
        way.clear(thing)
        for key, value in before.items():
            way.__setitem__(thing, key, value)
    elif isinstance(thing, list):
        thing[:] = before
    elif isinstance(thing, set | deque):
        thing.clear()
        thing.update(before) if isinstance(thing, set) else thing.extend(before)
    else:
        slots = _slots(type(thing))
        for name, slot in slots.items():
            if name in before:
                slot.__set__(thing, before[name])
            elif hasattr(thing, name):
                slot.__delete__(thing)
        if hasattr(thing, "__dict__"):
            thing.__dict__.clear()
            thing.__dict__.update({name: value for name, value in before.items() if name not in slots})
