"""Sizes whose items a forward runs over: `x.view(*x.shape[:-1], -1, 8)`, whatever the number of axes.

Python runs over the items of a size before any call sees them, so a trace must say how many there are. A forward is
traced for several numbers of axes, in all combinations where it runs over several sizes. In each trace all that it does
with the items (`len`, indexing, a loop) is what it does in a run on values of so many axes. Where the graphs are one and
the same once each complete row of the items of a size is written as that size spliced in, that is the graph for these
numbers of axes, and each run checks that it has one of them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .errors import SurgeryError, UntraceableError
from .nodes import new_node, same_code
from .ranks import rank_of

_FIRST = 6  # axes in the trace that tells which sizes are run over: as many as any part of a size needs
_NUMBERS = 4  # of axes that are tried, from the fewest that leave an item in each part of the size
_MOST = 64  # traces of one forward

# What takes the sizes one by one, or as one tuple.
_METHODS = {"view", "reshape", "expand", "repeat", "new_empty", "new_zeros", "new_ones"}
_FUNCTIONS = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}


class AxesError(UntraceableError):
    """What a forward does depends on how many axes a value has."""

    def __init__(self) -> None:
        super().__init__("its forward goes by the number of axes of a traced value")


Part = tuple[tuple[int | None, int | None], ...]  # slices of slices of a size


@dataclass(slots=True)
class Sizes:
    """The sizes that a forward runs over in one trace.

    Attributes:
        owner: the module whose children the trace calls.
        axes: how many axes the values have whose sizes they are, by the order in which they are met; values that have as
            many whatever their number count once.
        met: the nodes that read a size, and the parts of it (slices of slices) that are run over or counted.
        ranks: of each, the number of axes where the graph says it, else the value that has as many.
        items: the nodes that are items: of what, at which place, and of how many.
    """

    owner: nn.Module
    axes: tuple[int, ...] = ()
    met: dict[fx.Node, set[Part]] = field(default_factory=dict)
    ranks: dict[fx.Node, int | fx.Node] = field(default_factory=dict)
    items: dict[fx.Node, tuple[fx.Node, int, int]] = field(default_factory=dict)

    @property
    def open(self) -> list[fx.Node]:
        """The values whose numbers of axes are open, in the order in which they were met."""
        return [*dict.fromkeys(rank for rank in self.ranks.values() if isinstance(rank, fx.Node))]

    def fewest(self) -> list[int]:
        """The fewest axes that leave an item in each part, for each of the open values."""
        return [
            _fewest({part for read, parts in self.met.items() if self.ranks[read] is value for part in parts})
            for value in self.open
        ]

    def length(self, value: Any) -> int | None:
        """How many items a size has in this trace, or sizes and tuples one behind the other; None where it is neither."""
        if isinstance(value, tuple | list):
            return len(value)
        if not isinstance(value, fx.Node):
            return None
        if value.op == "call_function" and value.target is operator.add and not value.kwargs:
            lengths = [self.length(part) for part in value.args]
            return None if None in lengths else sum(length or 0 for length in lengths)
        found = part_of_size(value)
        if found is None:
            return None
        read, part = found
        self.met.setdefault(read, set()).add(part)
        rank = self.ranks[read] = self.ranks[read] if read in self.ranks else self._rank(read)
        if isinstance(rank, int):
            return _length(part, rank)
        place = self.open.index(rank)
        return _length(part, self.axes[place] if place < len(self.axes) else _FIRST)

    def run_over(self, value: Any, traced: Callable[[fx.Node], Any]) -> list[Any] | None:
        """The items of a size, or of sizes and tuples one behind the other, as in `*(x.shape[:-1] + (8,))`, as `traced`."""
        if isinstance(value, tuple | list):
            return [traced(item) if isinstance(item, fx.Node) else item for item in value]
        count = self.length(value)
        if count is None:
            return None
        if value.target is operator.add:
            return [item for part in value.args for item in self.run_over(part, traced) or ()]
        size = traced(value)
        items = [size[index] for index in range(count)]
        self.items |= {item.node: (value, index, count) for index, item in enumerate(items)}
        return items

    def _rank(self, read: fx.Node) -> int | fx.Node:
        of = read.args[0]
        assert isinstance(of, fx.Node), "the size of a value"
        return rank_of(of, self.owner, self._varies)

    def known(self, value: fx.Node) -> int | None:
        """The number of a value's axes, where the graph says it."""
        rank = rank_of(value, self.owner, self._varies)
        return rank if isinstance(rank, int) else None

    def is_sure(self, item: fx.Node) -> bool:
        """Whether an item of a size is there whatever the numbers of axes that are open."""
        found = part_of_size(self.items[item][0])
        return found is not None and isinstance(self.ranks[found[0]], int)

    def _varies(self, size: fx.Node) -> bool:
        return size in self.items and not self.is_sure(size)


def spliced(parts: tuple[Any, ...] | list[Any], at: tuple[tuple[int, int, int], ...]) -> tuple[Any, ...] | list[Any]:
    """The tuple or list of the parts, those `at` (place, fewest items, most items) spliced in.

    Raises:
        SurgeryError: a size has another number of items.

    >>> spliced((torch.Size([2, 7]), -1, 8), ((0, 1, 4),))
    (2, 7, -1, 8)
    """
    lengths = {place: (fewest, most) for place, fewest, most in at}
    whole: list[Any] = []
    for place, part in enumerate(parts):
        if place not in lengths:
            whole.append(part)
            continue
        fewest, most = lengths[place]
        if not isinstance(part, tuple) or not fewest <= len(part) <= most:
            raise SurgeryError(
                f"a rewritten forward takes {fewest} to {most} of the axes of a value one by one, and got the size "
                f"{part}: contract the model, or give it values with fewer or more axes"
            )
        whole += part
    return whole if isinstance(parts, list) else tuple(whole)


def joined(first: Sizes, traced: Callable[[tuple[int, ...]], tuple[fx.Graph, Sizes]]) -> fx.Graph:
    """The one graph of a forward for several numbers of axes.

    `first` is what its first trace met; `traced` traces it for these numbers of axes.

    Raises:
        AxesError: what it does depends on the number of axes.
        UntraceableError: no graph holds it.
    """
    fewest = first.fewest()
    if _NUMBERS ** len(fewest) > _MOST:
        raise UntraceableError(f"its forward runs over the items of {len(fewest)} sizes, each of its own length")
    graph: fx.Graph | None = None
    for axes in itertools.product(*(range(few, few + _NUMBERS) for few in fewest)):
        found, sizes = traced(axes)
        if len(sizes.met) != len(first.met) or len(sizes.open) != len(fewest):
            raise AxesError
        written = _Written(found, sizes, fewest).graph
        if graph is not None and not same_code(graph, written):
            raise AxesError
        graph = graph or written
    assert graph is not None
    return graph


class _Written:
    """A trace with each complete run of the items of a size written as that size spliced in."""

    def __init__(self, traced: fx.Graph, sizes: Sizes, fewest: list[int]) -> None:
        self.sizes, self.graph = sizes, fx.Graph()
        self.checked: dict[fx.Node, set[Part]] = {}  # what a run checks the length of
        self.fewest = dict(zip(sizes.open, fewest, strict=True))
        self.copies: dict[fx.Node, fx.Node] = {}
        for node in traced.nodes:
            if node not in sizes.items:
                args, kwargs = self.arguments(node)
                copy = self.copies[node] = new_node(self.graph, node.op, node.target, args, kwargs, None, node.type)
                copy.meta.update(node.meta)
                if node.op == "call_module" and any(value.target is spliced for value in copy.all_input_nodes):
                    raise UntraceableError("its forward passes a tuple with the items of a traced value to a module")
        open_parts = {read: parts for read, parts in sizes.met.items() if isinstance(sizes.ranks[read], fx.Node)}
        if self.checked != open_parts:  # nothing would notice a run on values with more axes
            raise AxesError

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = node.args, {key: self.written(value) for key, value in node.kwargs.items()}
        if not self.runs(args)[1]:
            return tuple(map(self.written, args)), kwargs
        before = 1 if node.op == "call_method" else 0
        takes_tuple = node.op == "call_method" and node.target in _METHODS
        if not takes_tuple and not (node.op == "call_function" and node.target in _FUNCTIONS):
            raise UntraceableError(f"its forward passes the items of a traced value one by one to {_name(node)}")
        return (*map(self.written, args[:before]), self.written(tuple(args[before:]))), kwargs

    def written(self, value: Any) -> Any:
        """An argument in the new graph."""
        if isinstance(value, fx.Node):
            return self.item(value) if value in self.sizes.items else self.copies[value]
        if isinstance(value, list | tuple):
            container = list if isinstance(value, list) else tuple
            parts, at = self.runs(value)
            own = tuple(self.copies[part] if i in at else self.written(part) for i, part in enumerate(parts))
            if not at:
                return container(own)
            limits = tuple((place, *self.limits(parts[place])) for place in at)
            return new_node(self.graph, "call_function", spliced, (container(own), limits), {})
        if isinstance(value, dict):
            return {key: self.written(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.written, (value.start, value.stop, value.step)))
        return value

    def item(self, value: fx.Node) -> fx.Node:
        """An item without the others: one that is sure to be there is taken out of its size."""
        if not self.sizes.is_sure(value):
            raise UntraceableError("its forward takes an item of a traced value out of a tuple of its items")
        size, index, _ = self.sizes.items[value]
        return new_node(self.graph, "call_function", operator.getitem, (self.copies[size], index), {})

    def runs(self, values: Any) -> tuple[list[Any], list[int]]:
        """The values with each complete run of items replaced by their size, and where that is."""
        parts: list[Any] = []
        at: list[int] = []
        rest = list(values)
        while rest:
            item = self.sizes.items.get(rest[0]) if isinstance(rest[0], fx.Node) else None
            if item is not None:
                size, _, count = item
                found = [self.sizes.items.get(each) for each in rest[:count] if isinstance(each, fx.Node)]
                if found == [(size, index, count) for index in range(count)]:
                    at.append(len(parts))
                    parts.append(size)
                    del rest[:count]
                    continue
            parts.append(rest.pop(0))
        return parts, at

    def limits(self, size: fx.Node) -> tuple[int, int]:
        """How few and how many items it had in the traces."""
        found = part_of_size(size)
        assert found is not None, "it was run over as a size"
        read, part = found
        rank = self.sizes.ranks[read]
        if isinstance(rank, int):
            return _length(part, rank), _length(part, rank)
        self.checked.setdefault(read, set()).add(part)
        few = self.fewest[rank]
        return _length(part, few), _length(part, few + _NUMBERS - 1)


def part_of_size(node: fx.Node) -> tuple[fx.Node, Part] | None:
    """Where a size is read, and the slices taken of it, for a node that is one or a slice of one."""
    part: Part = ()
    while node.target is operator.getitem and isinstance(node.args[1], slice) and isinstance(node.args[0], fx.Node):
        taken = node.args[1]
        if not _grows(taken):
            return None
        part = ((taken.start, taken.stop), *part)
        node = node.args[0]
    reads = node.op == "call_function" and node.target is getattr and node.args[1:] == ("shape",)
    asks = node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    return (node, part) if reads or asks else None


def _grows(taken: slice) -> bool:
    """Whether a slice of a longer size is never shorter, as `[-2:2]` is."""
    start, stop, step = taken.start, taken.stop, taken.step
    plain = step in (None, 1) and all(each is None or type(each) is int for each in (start, stop, step))
    return plain and (start is None or start >= 0 or stop is None or stop < 0)


_SPLITS: set[Any] = {
    "chunk", "split", "tensor_split", "split_with_sizes", torch.chunk, torch.split, torch.tensor_split,
    torch.split_with_sizes,
}  # fmt: skip


def parts_of(node: fx.Node, surely: bool = False) -> int | None:
    """Into how many parts a call cuts a value, where it says so: `chunk(3)`, `split([8, 8])`.

    A chunk makes fewer of a short axis; `surely` leaves out those of the first, which is as long as the batch.
    """
    if node.target not in _SPLITS:
        return None
    by_name = (value for name, value in node.kwargs.items() if name not in _NOT_HOW)
    how = node.args[1] if len(node.args) > 1 else next(by_name, None)
    if isinstance(how, list | tuple):
        return len(how) + ("tensor_split" in str(node.target))
    rows = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) == 0
    return how if isinstance(how, int) and "chunk" in str(node.target) and not (surely and rows) else None


_NOT_HOW = ("input", "tensor", "dim")


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _length(part: Part, axes: int) -> int:
    """How many items a part of a size has: never fewer with more axes, so a part that a run finds between those of the fewest
    and the most axes that were tried is as long as in one of the traces, and so are all parts together.
    """
    left = range(axes)
    for taken in part:
        left = left[slice(*taken)]
    return len(left)


def _fewest(parts: set[Part]) -> int:
    """The fewest axes that leave an item in every part."""
    for axes in range(1, _FIRST + 1):
        if all(_length(part, axes) for part in parts):
            return axes
    raise UntraceableError("its forward runs over a part of a size that has no items")
