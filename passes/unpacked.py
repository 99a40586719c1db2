"""Into how many names a frame unpacks a value: what `a, b = x` and `a, b, kind = *x.shape[-2:], x.dtype` say of it."""

from __future__ import annotations

import dis
from collections.abc import Sequence
from functools import cache
from types import CodeType, FrameType


def unpacked_into(frame: FrameType) -> tuple[int, int | None] | None:
    """Into how many names the frame unpacks a value now, and into how many behind a starred one (`a, *b, c = x`; None
    without one); None where it does something else with it.
    """
    return _unpackings(frame.f_code).get(frame.f_lasti)


@cache
def _unpackings(code: CodeType) -> dict[int, tuple[int, int | None]]:
    """How many names each unpacking fills, by its place in the bytecode; of a starred value, by the place of its star."""
    found: dict[int, tuple[int, int | None]] = {}
    instructions = [*dis.get_instructions(code)]
    for place, each in enumerate(instructions):
        if each.opname == "UNPACK_SEQUENCE":
            names = int(each.argval)
            found[each.offset] = names, None
            if (starred := _one_starred(instructions[:place])) is not None:
                found[starred[0].offset] = names - starred[1], None
        elif each.opname == "UNPACK_EX":
            found[each.offset] = each.argval & 0xFF, each.argval >> 8
    return found


def _one_starred(before: Sequence[dis.Instruction]) -> tuple[dis.Instruction, int] | None:
    """The one star in the list that the instructions end with, and how many other items that has; None elsewhere."""
    if not before or "LIST_TO_TUPLE" not in before[-1].opname + before[-1].argrepr:  # an intrinsic from Python 3.12 on
        return None
    star: dis.Instruction | None = None
    others = above = 0  # the values on the stack above the list
    for each in before[-2::-1]:
        if "JUMP" in each.opname or each.opname in ("FOR_ITER", "SEND"):
            return None
        ours = above == 0
        if ours and each.opname == "BUILD_LIST":
            return None if star is None else (star, others + int(each.argval))
        if ours and each.opname == "LIST_EXTEND":
            if star is not None:
                return None
            star = each
        others += ours and each.opname == "LIST_APPEND"
        above -= dis.stack_effect(each.opcode, each.arg)
    return None
