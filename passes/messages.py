"""Where a forward makes texts for people: what an error, a warning or a log says."""

from __future__ import annotations

import dis
from functools import cache, partial
from itertools import takewhile
from types import CodeType, FrameType


def says_something(frame: FrameType) -> bool:
    """Whether a text that a frame makes now is for people: what an error, a warning or a log is called with."""
    line, told = frame.f_lineno, _messages(frame.f_code)
    return any(first <= line <= last for first, last in told)


@cache
def _messages(code: CodeType) -> frozenset[tuple[int, int]]:
    """The lines of calls that tell people something."""
    told: set[tuple[int, int]] = set()
    talking: set[int | None] = set()
    for instruction in dis.get_instructions(code):
        where = instruction.positions
        if where is None or where.lineno is None or where.end_lineno is None:
            continue
        if instruction.argval in _TELLING and instruction.opname.startswith("LOAD"):
            talking.add(where.lineno)
        calls = instruction.opname.startswith("CALL") and where.lineno in talking
        if calls or instruction.opname == "RAISE_VARARGS":
            told.add((where.lineno, where.end_lineno))
    return frozenset(told)


_TELLING = frozenset(
    {"_assert", "print", "warn", "debug", "info", "warning", "warning_once", "warning_advice", "error"}
)


class Numbers:
    """Numbers in the texts of errors, as in `"%d axes" % x.dim()`, until the values' names take their places.

    >>> numbers = Numbers()
    >>> numbers.named(ValueError("%d axes" % numbers.standing_for("dim"))).args
    ('<dim> axes',)
    """

    def __init__(self) -> None:
        self._values: dict[int, object] = {}

    def standing_for(self, value: object) -> int:
        """A number that no text holds but for the value."""
        number = _UNUSUAL + len(self._values)
        self._values[number] = value
        return number

    def named(self, error: Exception) -> Exception:
        """The error, with the names of the values in its texts."""
        for number, value in self._values.items():
            error.args = tuple(
                arg.replace(str(number), f"<{value}>") if isinstance(arg, str) else arg for arg in error.args
            )
        return error


_UNUSUAL = 8_316_205_497_118_000_000


def makes_error(frame: FrameType) -> bool:
    """Whether a frame makes an error now, that it raises then: no more follows from a number in its text."""
    return frame.f_lasti in _errors(frame.f_code)


@cache
def _errors(code: CodeType) -> frozenset[int]:
    """The places in the bytecode that make an error: the rest of its statement, or what follows on an assertion."""
    found: set[int] = set()
    asserts = False
    for place, each in enumerate(instructions := [*dis.get_instructions(code)]):
        asserts = asserts or each.opname == "LOAD_ASSERTION_ERROR"
        if asserts:
            found.add(each.offset)
        elif each.opname == "RAISE_VARARGS" and each.positions is not None:
            statement = each.positions
            made = takewhile(partial(_within, statement), instructions[place - 1 :: -1])
            found |= {before.offset for before in made}
        asserts = asserts and each.opname != "RAISE_VARARGS"
    return frozenset(found)


def _within(statement: dis.Positions, part: dis.Instruction) -> bool:
    """Whether an instruction is a part of the statement."""
    bounds = (*(part.positions or (None,)), *statement)
    if None in bounds:
        return False
    line, end_line, column, end_column, first, last, start, stop = (bound or 0 for bound in bounds)
    return (first, start) <= (line, column) and (end_line, end_column) <= (last, stop)
