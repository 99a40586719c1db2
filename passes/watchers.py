"""Who looks at a module's attributes while its forward runs: a child, or a hook on one, that holds the module itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from .lent import modules_in
from .outside import is_plain_object
from .source import codes, is_left_out

_MOST = 2000  # things that are looked through for one child
_DEEPEST = 4  # how deep things in things are looked at
_REGISTERED = ("_modules", "_parameters", "_buffers")


def watches(child: nn.Module, owner: nn.Module) -> bool:
    """Whether a child, a module below it or a hook on one may read attributes of the owner, which it holds or names."""
    todo = [(value, 0) for inner in modules_in(child) for value in _reached_from(inner)]
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        value, depth = todo.pop()
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if any(inner is owner for inner in modules_in(value)):
                return True
        else:
            todo += [(inner, depth + 1) for inner in _inside(value)]
    return False


def _reached_from(module: nn.Module) -> Iterator[Any]:
    yield from (value for name, value in vars(module).items() if name not in _REGISTERED)
    if isinstance(type(module).forward, FunctionType) and not is_left_out(type(module)):
        yield type(module).forward


def _inside(value: Any) -> Iterator[Any]:
    """What a thing holds, closes over, is bound to or names."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
        named = {name for code in codes(value) for name in code.co_names}
        yield from (held for name in named if isinstance(held := value.__globals__.get(name), nn.Module))
    elif is_plain_object(value):
        yield from vars(value).values()
