"""The attributes that a forward sets of its own module: `self.attn = weights`, to be looked at after the call."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Set
from typing import Any

from torch import Tensor, fx, nn

from .errors import UntraceableError
from .traced import StoredTensor


class _Own:
    """The module whose graph it is, in the arguments of a call: in generated code it is called `self`."""

    def __repr__(self) -> str:
        return "self"


OWN = _Own()
_ABSENT = object()


class SetAttributes:
    """Those that a trace has set by now, really set, so that what the forward goes on to read is what it wrote.

    The graph sets each once, at the end, when a list that stands there is complete.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: dict[str, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Their names."""
        return frozenset(self._before)

    def __contains__(self, name: str) -> bool:
        return name in self._before

    def take(self, name: str, value: Any) -> bool:
        """Set an attribute; False where that would be more than to keep a value under a name."""
        held, cls = vars(self._module), type(self._module)
        registered = any(name in held[kind] for kind in ("_parameters", "_buffers", "_modules"))
        own_way = hasattr(inspect.getattr_static(cls, name, None), "__set__") or _sets_in_its_own_way(cls)
        if registered or own_way or name in _OF_EVERY_MODULE or _is_registered_when_set(value):
            return False
        self._before.setdefault(name, held.get(name, _ABSENT))
        object.__setattr__(self._module, name, value)
        return True

    def values(self) -> Iterator[tuple[str, Any]]:
        """What was set last, by name."""
        for name in self._before:
            yield name, vars(self._module)[name]

    def put_back(self) -> None:
        """Give the module what it had."""
        for name, before in self._before.items():
            if before is _ABSENT:
                vars(self._module).pop(name, None)
            else:
                vars(self._module)[name] = before


def refuse_memory(reads: Iterable[tuple[str, str, Any]], names: Set[str]) -> None:
    """Refuse a forward that reads what a call before it has set.

    Raises:
        UntraceableError: one of the names is among the reads from its own module.
    """
    name = next((name for where, name, _ in reads if not where and name in names), None)
    if name is not None:
        raise UntraceableError(f"its forward reads the attribute `{name}` that a call before it has set")


def returning(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph but for those that set attributes, and what is computed for these alone."""
    left: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target is setattr or (node.users and left.issuperset(node.users) and node.op != "placeholder"):
            left.add(node)
    return [node for node in graph.nodes if node not in left]


_OF_EVERY_MODULE = vars(nn.Module()).keys()


def _sets_in_its_own_way(cls: type[nn.Module]) -> bool:
    return any("__setattr__" in vars(base) for base in cls.__mro__ if base not in (nn.Module, object))


def _is_registered_when_set(value: Any) -> bool:
    if type(value) is StoredTensor:
        return isinstance(value.stored, nn.Parameter)
    return isinstance(value, Tensor | nn.Module) and not isinstance(value, fx.Proxy)
