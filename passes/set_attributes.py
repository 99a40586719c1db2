"""The attributes that a forward sets of its own module: `self.attn = weights`, to be looked at after the call."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Set
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from .calls import leaves
from .errors import UntraceableError
from .lent import containers_in
from .reads import OF_EVERY_MODULE
from .source import changed_by_forward, set_by_forward
from .traced import StoredTensor

if TYPE_CHECKING:
    from .trace import OwnerGraph

CONTAINERS = (list, dict, set, deque)


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
        self.looked_at = False  # all attributes at once, by `vars(self)` or `self.__dict__`
        self.constants: dict[str, str] = {}  # the numbers and texts in what was set last, as a text, by name

    @property
    def names(self) -> frozenset[str]:
        """Their names."""
        return frozenset(self._before)

    def __contains__(self, name: str) -> bool:
        return name in self._before

    def take(self, name: str, value: Any, was_read: bool) -> bool:
        """Set an attribute; False where that would be more than to keep a value under a name.

        Nothing is where it `was_read` to hold that very constant, for which the graph is made.
        """
        held, cls = vars(self._module), type(self._module)
        registered = any(name in held[kind] for kind in ("_parameters", "_buffers", "_modules"))
        own_way = hasattr(inspect.getattr_static(cls, name, None), "__set__") or _sets_in_its_own_way(cls)
        if registered or own_way or name in OF_EVERY_MODULE or _is_registered_when_set(value):
            return False
        if was_read and name not in self._before and (type(held.get(name)), held.get(name)) == (type(value), value):
            return True
        self._before.setdefault(name, held.get(name, _ABSENT))
        object.__setattr__(self._module, name, value)
        return True

    def values(self) -> Iterator[tuple[str, Any]]:
        """What was set last, by name.

        Raises:
            UntraceableError: the forward may also have read what a call before it has set.
        """
        if self._before and self.looked_at:
            raise UntraceableError("its forward sets attributes, and looks at the dict that holds them")
        for name in self._before:
            value = vars(self._module)[name]
            constants = [leaf for leaf in leaves(value) if type(leaf) in (int, float, str)]
            if constants:
                self.constants[name] = repr(constants)
            yield name, value

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
        if _sets(node) or (node.users and left.issuperset(node.users) and node.op != "placeholder"):
            left.add(node)
    return [node for node in graph.nodes if node not in left]


def refuse_change(once: dict[str, str], again: dict[str, str]) -> None:
    """Refuse a forward that sets an attribute to another number or text in each run: the time, or a count of its calls.

    Raises:
        UntraceableError: the constants of two traces are not the same.
    """
    name = next((name for name in once if again.get(name) != once[name]), None)
    if name is not None:
        raise UntraceableError(f"its forward sets the attribute `{name}` to something else at each call")


def refuse_shared(name: str, value: Any, others: Iterable[Any]) -> None:
    """Refuse to keep a list or dict that others hold too: the graph makes one for each, and a change would reach but one.

    Raises:
        UntraceableError: there is one in the value that is among the others as well.
    """
    held = {id(each) for each in containers_in(value)}
    if any(id(each) in held for other in others for each in containers_in(other)):
        raise UntraceableError(f"its forward sets the attribute `{name}` to a list or dict that others hold as well")


def refuse_mixed(graphs: Iterable[OwnerGraph], new: OwnerGraph) -> None:
    """Refuse a forward that, called in one way, reads what it has set when it was called in another.

    Raises:
        UntraceableError: it does so, in the new graph or in those that are known.
    """
    known = list(graphs)
    refuse_memory(new.reads, names_set(version for graph in known for version in graph.versions))
    refuse_memory((read for graph in known for read in graph.reads), names_set(new.versions))


def names_set(graphs: Iterable[fx.Graph | None]) -> set[str]:
    """The names of the attributes that graphs set."""
    named = (node.args[-2] for graph in graphs if graph is not None for node in graph.nodes if _sets(node))
    return {str(name) for each in named for name in (each.args[1:] if isinstance(each, fx.Node) else (each,))}


def _sets(node: fx.Node) -> bool:
    return setattr in (node.target, getattr(node.target, "within", None))


def is_set_by(module: nn.Module, name: str, value: Any) -> bool:
    """Whether the forward of a module sets an attribute of it, or changes the container that stands there."""
    cls: Any = type(module)
    return name in set_by_forward(cls) or (isinstance(value, CONTAINERS) and name in changed_by_forward(cls))


def _sets_in_its_own_way(cls: type[nn.Module]) -> bool:
    return any("__setattr__" in vars(base) for base in cls.__mro__ if base not in (nn.Module, object))


def _is_registered_when_set(value: Any) -> bool:
    if type(value) is StoredTensor:
        return isinstance(value.stored, nn.Parameter)
    return isinstance(value, Tensor | nn.Module) and not isinstance(value, fx.Proxy)
