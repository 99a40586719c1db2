"""Sequentials that a forward runs in parts: `self.layers[:-1](x)` makes a new Sequential of the class that this one has."""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType
from typing import TypeGuard

from torch import nn

from .errors import UntraceableError
from .source import nested
from .trace import Tracing

Sliced = tuple[str, int]


def taken_in_parts(tracing: Tracing) -> dict[str, UntraceableError]:
    """The Sequentials of a model of which a forward takes a part, by their paths: ψ belongs to their modules, not to them."""
    cut = {path: module for path, module in tracing.modules.items() if is_cut_by_torch(type(module))}
    if not cut:
        return {}
    codes = (code for each in tracing.functions() for code in nested(each.__code__))
    sliced = frozenset[Sliced]().union(*map(_sliced, codes))
    return {
        path: UntraceableError(f"{path} ({type(module).__name__}): a forward of the model runs a part of it, a slice")
        for path, module in cut.items()
        if _is_named(path, sliced)
    }


def is_cut_by_torch(cls: type[nn.Module]) -> TypeGuard[type[nn.Sequential]]:
    """Whether a slice of a module of this class is a new module of the same class."""
    return issubclass(cls, nn.Sequential) and cls.__getitem__ is nn.Sequential.__getitem__


def _is_named(path: str, sliced: frozenset[Sliced]) -> bool:
    """Whether a path ends in the name of a sliced attribute, and as many numbers as it was subscribed with."""
    steps = path.split(".")
    return any(
        steps[-1 - count :][0] == name and all(step.isdigit() for step in steps[len(steps) - count :])
        for name, count in sliced
        if count < len(steps)
    )


@cache
def _sliced(code: CodeType) -> frozenset[Sliced]:
    """The attributes of which a code takes slices, and the items of how many subscripts: `self.layers[1:]` is (layers, 0),
    `self.blocks[i][:-1]` is (blocks, 1). Bounds that are computed are not followed.
    """
    steps = [each for each in dis.get_instructions(code) if each.opname not in _NOTHING]
    found: set[Sliced] = set()
    for place, step in enumerate(steps):
        if step.opname in ("BUILD_SLICE", "BINARY_SLICE"):
            before = _before_bounds(steps, place, step.arg or 2)
        elif step.opname == "LOAD_CONST" and isinstance(step.argval, slice):
            before = place - 1
        else:
            continue
        count = 0
        while before is not None and steps[before].opname in _SUBSCRIPTS:
            before, count = _before_bounds(steps, before, 1), count + 1
        if before is not None and steps[before].opname == "LOAD_ATTR":
            found.add((str(steps[before].argval), count))
    return frozenset(found)


def _before_bounds(steps: list[dis.Instruction], place: int, count: int) -> int | None:
    """The place of what stands before so many plain values that a step takes; None where one is computed."""
    here = place - 1
    while count > 0:
        while here >= 0 and steps[here].opname in ("LOAD_ATTR", "UNARY_NEGATIVE"):
            here -= 1
        if here < 0 or not steps[here].opname.startswith("LOAD_"):
            return None
        count -= 2 if steps[here].opname.count("LOAD_") == 2 else 1
        here -= 1
    return here if count == 0 and here >= 0 else None


_NOTHING = ("NOP", "EXTENDED_ARG", "PRECALL")
_SUBSCRIPTS = ("BINARY_SUBSCR", "BINARY_OP")
