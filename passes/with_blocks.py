"""`with` blocks: a graph holds the calls in one, but not what it switches on for them, nor the errors that it swallows."""

from __future__ import annotations

import dis
from collections.abc import Set
from functools import cache
from itertools import pairwise
from types import CodeType, FrameType


@cache
def has_with(code: CodeType) -> bool:
    """Whether a code enters a `with` block."""
    opening = ("BEFORE_WITH", "SETUP_WITH", "LOAD_SPECIAL")
    return any(instruction.opname in opening for instruction in dis.get_instructions(code))


def in_with(frame: FrameType | None, root: CodeType, own: Set[CodeType]) -> str | None:
    """The name of a function that is inside of a `with` block now: of the frame, or of one that called it below `root`.

    Those of torch, of this compiler and of functools (its cached properties take a lock) do not count, but for those in
    `own`: what torch decorates a method with.
    """
    while frame is not None and frame.f_code is not root:
        code, place = frame.f_code, frame.f_lasti
        blocks = _blocks(code) if code.co_exceptiontable else ()  # to look a code up takes long
        if any(start <= place < end for start, end in blocks) and (code in own or _counts(frame)):
            return code.co_name
        frame = frame.f_back
    return None


def _counts(frame: FrameType) -> bool:
    return not f"{frame.f_globals.get('__name__')}.".startswith(("torch.", "functools.", f"{__package__}."))


@cache
def _blocks(code: CodeType) -> tuple[tuple[int, int], ...]:
    """Where in the bytecode a `with` block is open: an error that is raised there is shown to it."""
    if not has_with(code):
        return ()
    steps = [each for each in dis.get_instructions(code) if each.opname not in ("NOP", "NOT_TAKEN")]
    after = {one.offset: two.opname for one, two in pairwise(steps)}
    entries = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]  # typeshed does not know it

    def shows(target: int, seen: frozenset[int] = frozenset()) -> bool:
        """Whether a `with` is shown the error there, or what is raised there."""
        around = (each.target for each in entries if each.start <= target < each.end and each.target not in seen)
        return after.get(target) == "WITH_EXCEPT_START" or any(shows(each, seen | {target}) for each in around)

    return tuple((each.start, each.end) for each in entries if shows(each.target))
