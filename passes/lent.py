"""Lists and dicts that a forward makes and gives to its children: one that a child fills is not what the trace saw."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn

from .source import CHANGES, run_by_forward


class Lent:
    """The containers that children which may change them were called with."""

    def __init__(self) -> None:
        self._lent: dict[int, Any] = {}

    def lend(self, child: nn.Module, passed: Any, given: set[int]) -> bool:
        """Note the containers among what a child is called with; False where it may change one that is looked at later.

        That is one without an item, made to be filled, one that the forward was `given` itself, and one lent before.
        """
        held = list(containers_in(passed))
        classes: set[Any] = {type(inner) for inner in modules_in(child)} if held else set()
        if not any(fills(cls) for cls in classes):
            return True
        kept = all(each and id(each) not in given and id(each) not in self._lent for each in held)
        self._lent |= {id(each): each for each in held}
        return kept

    def holds(self, value: Any) -> bool:
        """Whether there is a lent container in a value."""
        return any(id(each) in self._lent for each in containers_in(value))


def modules_in(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those below it, asked for in a way that a trace does not take for reads of the forward."""
    yield module
    for child in vars(module)["_modules"].values():
        if child is not None:
            yield from modules_in(child)


def containers_in(value: Any) -> Iterator[list[Any] | dict[Any, Any]]:
    """The lists and dicts that a value is or holds."""
    if isinstance(value, list | dict):
        yield value
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers_in(item)


@cache
def fills(cls: type[nn.Module]) -> bool:
    """Whether a function that a class's forward may run changes a container that it is called with."""
    return any(map(_changes_argument, run_by_forward(cls)))


@cache
def _changes_argument(code: CodeType) -> bool:
    taken = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    changing = (before for before, step in pairwise(dis.get_instructions(code)) if step.argval in CHANGES)
    return any(before.opname.startswith("LOAD_FAST") and _last_loaded(before.argval) in taken for before in changing)


def _last_loaded(loaded: Any) -> Any:
    """The name of a local variable; later Pythons load two at once."""
    return loaded[-1] if isinstance(loaded, tuple) else loaded
