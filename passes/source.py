"""What the bytecode of a forward, and of the functions it calls, says of it: names, activations, and traps of tracing."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from .activations import FUNCTIONS, MODULES, NAMES
from .with_blocks import has_with

_FARTHEST = 200  # functions that are looked at for one forward
_LONGEST = 64  # items of a container that are looked at
_DEEPEST = 3  # containers in containers


def codes(function: Callable[..., Any]) -> list[CodeType]:
    """The code of a function, of what it wraps, and of the functions that it defines inside."""
    return [code for each in functions_of(function) for code in nested(each.__code__)]


def reached(function: Callable[..., Any], cls: type[nn.Module]) -> list[FunctionType]:
    """The Python functions that a method may run: itself, the class's own methods, and the functions it names.

    torch's own functions are left out: a graph holds calls of them. So are those of NumPy, which take no traced value, and of
    the standard library but for what passes values on: a forward that warns reaches half of it.
    """
    found: dict[FunctionType, None] = {}
    todo = functions_of(function)
    while todo and len(found) < _FARTHEST:
        here = todo.pop()
        if here in found or is_left_out(here):
            continue
        found[here] = None
        todo += [layer for named in _named(here, cls) for layer in functions_of(named)]
    return list(found)


def run_by_forward(cls: type[nn.Module]) -> Iterator[CodeType]:
    """The code that a class's forward may run."""
    return (code for function in reached(cls.forward, cls) for code in nested(function.__code__))


@cache
def set_by_forward(cls: type[nn.Module]) -> frozenset[str]:
    """The names of the attributes that a class's forward sets, or a function that it may run."""
    return frozenset().union(*map(_set_by, run_by_forward(cls)))


@cache
def _set_by(code: CodeType) -> frozenset[str]:
    named = code.co_consts if "setattr" in code.co_names else ()
    stored = (each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR")
    return frozenset((*stored, *(name for name in named if isinstance(name, str))))


@cache
def changed_by_forward(cls: type[nn.Module]) -> frozenset[str]:
    """The names of the attributes whose items a class's forward changes: `self.losses.append(x)`, `self.info["k"] = x`."""
    return frozenset().union(*map(_changed_by, run_by_forward(cls)))


@cache
def _changed_by(code: CodeType) -> frozenset[str]:
    steps = list(dis.get_instructions(code))
    found = [
        one.argval
        for one, two, three in zip(steps, steps[1:], [*steps[2:], None], strict=False)
        if one.opname == "LOAD_ATTR" and (two.argval in CHANGES or (three and three.opname.endswith("E_SUBSCR")))
    ]
    return frozenset(found)


CHANGES = frozenset(
    {
        *("append", "appendleft", "extend", "insert", "pop", "popleft", "remove", "clear", "sort", "reverse"),
        *("update", "setdefault", "popitem", "add", "discard"),
    }
)


def mapped_by(functions: Iterable[FunctionType]) -> list[FunctionType]:
    """The functions in mappings that these functions name, such as a table of attentions, or of activations with their gains:
    which of them a forward calls, it decides in a run.
    """
    found: dict[FunctionType, None] = {}
    for each in functions:
        named = (each.__globals__.get(name) for code in nested(each.__code__) for name in code.co_names)
        for table in named:
            items = _items_of(table) if isinstance(table, Mapping) else ()
            found |= {function: None for item in items for function in functions_of(item)}
    return list(found)


def _items_of(container: Any, depth: int = 0) -> Iterator[Any]:
    """What a container of few items holds, in containers inside as well."""
    if not isinstance(container, Mapping | list | tuple):
        yield container
    elif len(container) <= _LONGEST and depth < _DEEPEST:
        for item in container.values() if isinstance(container, Mapping) else container:
            yield from _items_of(item, depth + 1)


def activations_named(functions: Iterable[FunctionType], cls: type[nn.Module]) -> dict[str, FunctionType]:
    """The activations that functions name as functions, tensor methods or classes, each with the first that does."""
    found: dict[str, FunctionType] = {}
    for each in functions:
        for activation in _named_by(each, cls):
            found.setdefault(activation, each)
    return found


def _named_by(function: FunctionType, cls: type[nn.Module]) -> Iterator[str]:
    for code in nested(function.__code__):
        mentioned = (*code.co_names, *(code.co_consts if "getattr" in code.co_names else ()))
        yield from (NAMES[name] for name in mentioned if isinstance(name, str) and name in NAMES)
        for name in code.co_names:
            value = function.__globals__.get(name)
            yield from activations_in(value)
            if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                yield from activations_named(reached(value.forward, cls), cls)


def activations_in(value: Any) -> list[str]:
    """The activations that a value is, or that a container of few items holds: as functions, classes or modules."""
    if isinstance(value, dict | list | tuple):
        return [name for item in _items_of(value) for name in activations_in(item)]
    if isinstance(value, partial):
        return activations_in(value.func)
    known: str | None = None
    if isinstance(value, type):
        known = MODULES.get(value)
    elif callable(value) and not isinstance(value, nn.Module):
        named = NAMES.get(getattr(value, "__name__", "")) if not isinstance(value, FunctionType) else None
        known = FUNCTIONS.get(value) or named
    return [known] if known else []


def activations_below(module: nn.Module) -> list[str]:
    """The activations that a module which is no part of the model is, calls, or holds."""
    found: list[str] = []
    for cls in dict.fromkeys(type(inner) for inner in module.modules()):
        found += activations_in(cls)
        own = cls.forward if not is_left_out(cls) else None
        found += activations_named(reached(own, cls), cls) if own else ()
    return found


def trap(function: Callable[..., Any], functions: Iterable[FunctionType]) -> str | None:
    """Why running a method, and the functions it reaches, on traced values would not show what it does; None if it would."""
    if any(map(has_with, codes(function))):
        return "its forward enters a `with` block, which a graph can't hold"
    return next((why for each in functions for code in nested(each.__code__) if (why := _trap(code))), None)


@cache
def _trap(code: CodeType) -> str | None:
    """What asks for the identity or the exact type of a value: a traced value answers it wrongly, and unseen."""
    before: dis.Instruction | None = None
    asks_type: set[int | None] = set()
    compares: set[int | None] = set()
    line: int | None = None
    told = _about_own_class(code)
    for instruction in dis.get_instructions(code):
        line = instruction.positions.lineno if instruction.positions else line
        if instruction.opname in ("MATCH_CLASS", "MATCH_SEQUENCE", "MATCH_MAPPING"):
            return f"`{code.co_name}` matches a value by its type, which a traced value does not have"
        if instruction.opname == "STORE_GLOBAL":
            return f"`{code.co_name}` sets the global variable `{instruction.argval}`, which a graph can't hold"
        constant = (before and before.opname == "LOAD_CONST") or instruction.offset in told
        if instruction.opname == "IS_OP" and not constant:
            return f"`{code.co_name}` asks whether two values are the same object, which a trace can't tell"
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval == "type" and instruction.offset not in told:
            asks_type.add(line)
        if instruction.opname in ("IS_OP", "COMPARE_OP", "CONTAINS_OP"):
            compares.add(line)
        before = instruction
    if asks_type & compares:
        return f"`{code.co_name}` compares the exact type of a value, which a traced value does not have"
    return None


def _about_own_class(code: CodeType) -> set[int]:
    """Where in the bytecode a method asks for `type(self)`, and whether something of it (`type(self).forward`) is another
    object: its own class is no traced value.
    """
    found: set[int] = set()
    steps = [each for each in dis.get_instructions(code) if each.opname not in ("PRECALL", "PUSH_NULL")]
    for place, (asks, own, calls) in enumerate(zip(steps, steps[1:], steps[2:], strict=False)):
        type_of_self = asks.argval == "type" and own.argval == "self" and own.opname.startswith("LOAD")
        if not (type_of_self and asks.opname == "LOAD_GLOBAL" and calls.opname == "CALL"):
            continue
        found.add(asks.offset)
        rest = place + 3
        while rest < len(steps) and steps[rest].opname == "LOAD_ATTR":
            rest += 1
        if [each.opname[:4] for each in steps[rest : rest + 2]] == ["LOAD", "IS_O"]:
            found.add(steps[rest + 1].offset)
    return found


def raised_by(error: Exception, functions: Iterable[FunctionType]) -> bool:
    """Whether a `raise` or an `assert` of one of the functions raised the error."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None:
        return False
    code, own = step.tb_frame.f_code, (inner for function in functions for inner in nested(function.__code__))
    return code in own and step.tb_lasti in _raises(code)


@cache
def _raises(code: CodeType) -> frozenset[int]:
    """Where in the bytecode something is raised."""
    return frozenset(each.offset for each in dis.get_instructions(code) if each.opname == "RAISE_VARARGS")


Caught = tuple[tuple[int, int], ...]


@cache
def caught(code: CodeType) -> Caught:
    """Where in the bytecode an error does not end the call: the ranges of `try` whose `except` goes on."""
    steps = [each for each in dis.get_instructions(code) if each.opname not in ("NOP", "NOT_TAKEN")]
    places = {each.offset: place for place, each in enumerate(steps)}
    entries = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]  # typeshed does not know it

    def drops(target: int, seen: frozenset[int] = frozenset()) -> bool:
        """Whether the error is dropped there, or where what is raised there is handled."""
        around = (each.target for each in entries if each.start <= target < each.end and each.target not in seen)
        return _goes_on(steps, places[target]) or any(drops(each, seen | {target}) for each in around)

    return tuple((each.start, each.end) for each in entries if drops(each.target))


def is_tried(frame: FrameType | None, trying: Mapping[CodeType, Caught]) -> bool:
    """Whether a frame, or one that called it, would catch an error that is raised now, and go on."""
    while frame is not None:
        if any(start <= frame.f_lasti < end for start, end in trying.get(frame.f_code, ())):
            return True
        frame = frame.f_back
    return False


def _goes_on(steps: list[dis.Instruction], place: int) -> bool:
    """Whether what handles errors from this place on drops one; what ends in a `raise`, or a `finally`, hands it on."""
    if steps[place].opname != "PUSH_EXC_INFO" or steps[place + 1].opname == "WITH_EXCEPT_START":
        return False
    for before, here, after in zip(steps[place:], steps[place + 1 :], steps[place + 2 :], strict=False):
        if here.opname == "POP_EXCEPT":
            if after.opname != "RERAISE":
                return True
            if before.opname == "COPY":
                return False
    return False


def unpacked_into(frame: FrameType) -> tuple[int, int | None] | None:
    """Into how many names the frame unpacks a value now (`a, b = x`), and into how many behind a starred one
    (`a, *b, c = x`; None without one); None where it does something else with it.
    """
    return _unpackings(frame.f_code).get(frame.f_lasti)


@cache
def _unpackings(code: CodeType) -> dict[int, tuple[int, int | None]]:
    """How many names each unpacking fills, by its place in the bytecode."""
    counts = [(each.offset, each.opname, each.argval) for each in dis.get_instructions(code)]
    plain = {offset: (count, None) for offset, name, count in counts if name == "UNPACK_SEQUENCE"}
    return plain | {offset: (both & 0xFF, both >> 8) for offset, name, both in counts if name == "UNPACK_EX"}


def reads_class(frame: FrameType) -> bool:
    """Whether a frame reads the `__class__` of a value now; C functions look at it too, on their own."""
    return frame.f_lasti in _class_reads(frame.f_code)


@cache
def _class_reads(code: CodeType) -> frozenset[int]:
    """Where in the bytecode `__class__` is read."""
    reads = (each for each in dis.get_instructions(code) if each.opname == "LOAD_ATTR")
    return frozenset(each.offset for each in reads if each.argval == "__class__")


def asks_device(function: FunctionType) -> bool:
    """Whether a function looks at what a device is; to make a tensor on the device of another is no question."""
    return any(map(_asks_device, nested(function.__code__)))


_DEVICE_QUESTIONS = {"is_cuda", "is_cpu", "is_meta", "is_mps", "is_xla", "get_device", "is_available"}


@cache
def _asks_device(code: CodeType) -> bool:
    before: str | None = None
    for instruction in dis.get_instructions(code):
        name = instruction.argval if isinstance(instruction.argval, str) else ""
        compares = instruction.opname in ("COMPARE_OP", "IS_OP", "CONTAINS_OP")
        if name in _DEVICE_QUESTIONS or (before == "device" and (compares or name in ("type", "index"))):
            return True
        before = name if instruction.opname.startswith("LOAD") else before if compares else None
    return False


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


@cache
def nested(code: CodeType) -> tuple[CodeType, ...]:
    """A code, and those of the functions that it defines inside."""
    inner = [each for constant in code.co_consts if isinstance(constant, CodeType) for each in nested(constant)]
    return (code, *inner)


def functions_of(value: Any) -> list[FunctionType]:
    """The Python functions of a callable: itself, and what it wraps; of an object, its class's `__call__`."""
    if isinstance(value, FunctionType) and not value.__dict__:
        return [value]
    if value is None or isinstance(value, type | BuiltinFunctionType):
        return []
    if isinstance(value, partial | cached_property):
        return functions_of(value.func)
    if isinstance(value, staticmethod | classmethod | MethodType):
        return functions_of(value.__func__)
    if isinstance(value, property):
        return functions_of(value.fget)
    if not callable(value):
        return []
    layers = [function for function in (value, inspect.unwrap(value)) if isinstance(function, FunctionType)]
    call = None if layers or isinstance(value, nn.Module) else inspect.getattr_static(type(value), "__call__", None)
    return list(dict.fromkeys(layers)) or (functions_of(call) if isinstance(call, FunctionType) else [])


def is_left_out(thing: FunctionType | type) -> bool:
    """Whether a graph holds calls of the function (torch's), or it takes names, text and code, and not values."""
    return str(thing.__module__).split(".")[0] in _TAKING_NO_VALUES


_PASSING_VALUES_ON = {"collections", "contextlib", "copy", "dataclasses", "functools", "itertools", "operator", "types"}
_TAKING_NO_VALUES = (sys.stdlib_module_names - _PASSING_VALUES_ON) | {"torch", "numpy", "_frozen_importlib"}


def _named(function: FunctionType, cls: type[nn.Module]) -> Iterator[Any]:
    """What the function's names stand for: methods of the class, globals, functions of modules, and closed-over values."""
    for code in nested(function.__code__):
        spaces: list[ModuleType] = []
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType):
                if value.__name__.split(".")[0] != "torch":
                    spaces.append(value)
            elif value is not None:
                yield value
            if not hasattr(nn.Module, name):
                yield next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
            elif name == "forward" and "super" in code.co_names:
                yield from (vars(base)["forward"] for base in cls.__mro__[1:] if "forward" in vars(base))
            for space in spaces:
                yield getattr(space, name, None)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
