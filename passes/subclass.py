"""Extended owners' classes: a subclass of the owner's class, with functions compiled from a text in place of its own.

The subclass is made once for every (original class, code), so that equal blocks share one class and one compiled region.
"""

from __future__ import annotations

import copy
import itertools
import linecache
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

from torch import nn

from .errors import PlanError, SurgeryError
from .parts import is_cut_by_torch
from .reads import fingerprint

Rewriter = Callable[[nn.Module, str, tuple[Any, ...], dict[str, Any]], None]

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Code:
    """Functions as a text, what the names in it mean, and what it was made for.

    `methods` are the functions that become methods, and whether the module itself held each as an attribute. `flags`
    are attributes with their fingerprints: the subclass lets no other value in. `rewriter` is asked to give a module a
    class that knows one more way of calling a method.
    """

    methods: Mapping[str, bool]
    source: str
    scope: Mapping[str, Any]
    rewriter: Rewriter
    flags: Mapping[str, object] = field(default_factory=dict)


def subclass(original: type[nn.Module], code: Code) -> type[nn.Module]:
    """The subclass that runs the code.

    Raises:
        PlanError: the class can't be subclassed.
    """
    objects = tuple(sorted((name, id(value)) for name, value in code.scope.items()))
    key = (original, code.source, objects, tuple(code.methods.items()), tuple(sorted(code.flags.items(), key=str)))
    if key not in _classes:
        _classes[key] = _new_class(original, code)
    return _classes[key]


def is_extended_owner(module: nn.Module) -> bool:
    """Whether the module's class is one that insertion generated."""
    return "_bypass_original" in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before the insertion."""
    return cast(type[nn.Module], type(module).__dict__["_bypass_original"])


def _new_class(original: type[nn.Module], code: Code) -> type[nn.Module]:
    filename = f"<bypass_fx {original.__qualname__} {next(_serial)}>"
    linecache.cache[filename] = (len(code.source), None, code.source.splitlines(keepends=True), filename)
    namespace = dict(code.scope)
    exec(compile(code.source, filename, "exec"), namespace)
    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__getstate__": _refuse_pickling,
        "__copy__": _refuse_copying,
        "_bypass_original": original,
        "_bypass_rewriter": staticmethod(code.rewriter),
    }
    for name, held in code.methods.items():
        namespace[name].__doc__ = getattr(getattr(original, name, None), "__doc__", None)
        body[name] = _before_the_instance(namespace[name]) if held else namespace[name]
    if code.flags:
        body["__setattr__"] = _guarding(original, code.flags)
    if is_cut_by_torch(original):
        body["__getitem__"] = _refusing_parts(original)
    if not hasattr(original, "__deepcopy__"):
        body["__deepcopy__"] = _deepcopy
    try:
        with _unannounced(original):
            return type(f"Bypass{original.__name__}", (original,), body)
    except TypeError as error:
        raise PlanError(f"{original.__name__} can't be subclassed ({error}); leave it out with select") from error


@contextmanager
def _unannounced(cls: type[nn.Module]) -> Iterator[None]:
    """Keep the news of a subclass from the class's `__init_subclass__`, which may want arguments or keep a register."""
    if not any("__init_subclass__" in base.__dict__ for base in cls.__mro__[:-1]):
        yield
        return
    own = cls.__dict__.get("__init_subclass__")
    cls.__init_subclass__ = classmethod(lambda cls, **kwargs: None)  # type: ignore[assignment]
    try:
        yield
    finally:
        if own is None:
            del cls.__init_subclass__
        else:
            cls.__init_subclass__ = own  # type: ignore[method-assign]


def _before_the_instance(method: Callable[..., Any]) -> property:
    """The method as an attribute that goes before the one that the instance holds: the instance stays as it is."""
    return property(lambda self: MethodType(method, self))


def _guarding(original: type[nn.Module], flags: Mapping[str, object]) -> Callable[[nn.Module, str, Any], None]:
    """A `__setattr__` that refuses what the generated code would not follow."""

    def guarded(self: nn.Module, name: str, value: Any) -> None:
        if name in flags and fingerprint(value) != flags[name]:
            raise SurgeryError(
                f"the forward of this {original.__name__} was rewritten for the present value of `{name}`: "
                "contract the model, set it, and extend again"
            )
        original.__setattr__(self, name, value)

    return guarded


def _refusing_parts(original: type[nn.Sequential]) -> Callable[[nn.Sequential, Any], nn.Module]:
    """A `__getitem__` that makes no part of the module: it would be one of the same class, without its δ."""

    def item(module: nn.Sequential, key: Any) -> nn.Module:
        if isinstance(key, slice):
            raise SurgeryError(
                f"a part of an extended {original.__name__} would lose its δ: contract the model first, or leave the sites "
                "of this module out with select"
            )
        part: nn.Module = original.__getitem__(module, key)
        return part

    return item


def _refuse_pickling(module: nn.Module) -> None:
    raise SurgeryError(
        f"an extended {original_class(module).__name__} can't be pickled: save its state_dict(), or contract it first"
    )


def _refuse_copying(module: nn.Module) -> None:
    raise SurgeryError(
        f"a shallow copy of an extended {original_class(module).__name__} would share its δ and lose them with it: "
        "use copy.deepcopy, or contract it first"
    )


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    replica = module.__new__(type(module))
    memo[id(module)] = replica
    replica.__dict__ = copy.deepcopy(module.__dict__, memo)
    return replica
