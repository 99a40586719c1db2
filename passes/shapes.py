"""Channels from example inputs: where provenance does not settle them, one run without values tells the shapes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .axes import ChannelAxes
from .calls import bound_to_placeholders, call_of
from .channels import Channels
from .elementwise import activation_input
from .errors import in_short
from .lengths import shorter
from .link import Linked
from .nodes import takes_no_argument
from .runs import Way, attempt, on_meta, replay, shadowed, ways
from .units import Arguments, ExampleInputs, Spot, Unit, arguments_of

Shape = tuple[int, ...]
Call = tuple[Shape, int | None]  # the shape of a value, and the axis of its channels where that was told, from the end


class Run:
    """What a run of the model on the example inputs told, in the first of the `ways` to run it that tells enough.

    Attributes:
        channels: the channels of each activation's input, along the axis that the map or the norm tells which it comes
            from; where none does, along axis 1 of a value of four or five axes, and along the last of any other. One that
            has four or five axes in some calls only has them along the last where these agree, and else along axis 1.
        calls: the shapes that each activation's input had, over all calls, and the axes that were told.
        batch: the activations whose channels may be the rows of the batch, and those of no other call: their input has a
            single axis, or one as long as the first axis of the inputs, and nothing told.
        positions: the activations whose channels would be positions, and those of no other call: nothing told their axis,
            and inputs of another length give them another number.
        complex: the activations whose input was complex in some call.
        failure: why the run ended early, if it did; "" otherwise.
        broken: why the graphs of some units do not run on what the model passes.
    """

    def __init__(self, linked: Linked, spots: Iterable[Spot], inputs: ExampleInputs, once: bool = False) -> None:
        self.channels: dict[Spot, Channels] = {}
        self.calls: dict[Spot, dict[Call, None]] = {}
        self.complex: set[Spot] = set()
        self.failure, self._ended = "", False
        self.broken: dict[Unit, str] = {}
        self._replayed: set[Hashable] = set()
        self._axes = ChannelAxes()
        wanted: dict[Unit, list[Spot]] = {}
        for spot in spots:
            wanted.setdefault(spot.unit, []).append(spot)
        arguments = arguments_of(inputs)
        for way in ways(linked.tracing, *arguments):
            self.failure = self._run(linked, wanted, way, *arguments)
            self._ended = not self.failure
            told = self.calls.keys() >= set(itertools.chain(*wanted.values()))
            if told:
                self.failure = ""
            if not self.failure and (told or way is not on_meta):
                break
        found = {spot: channels for spot, calls in self.calls.items() if (channels := _agreed([*calls]))}
        rows = next(
            (leaf.shape[0] for leaf in tree_leaves(tuple(arguments)) if isinstance(leaf, Tensor) and leaf.dim()), 0
        )
        self.batch = {spot for spot, channels in found.items() if _may_be_rows(spot, channels, self.calls[spot], rows)}
        self.channels = {spot: channels for spot, channels in found.items() if spot not in self.batch}
        self.positions = set[Spot]() if once else self._positions(linked, arguments)
        self.channels = {spot: channels for spot, channels in self.channels.items() if spot not in self.positions}

    def _positions(self, linked: Linked, arguments: Arguments) -> set[Spot]:
        """The activations of whose channels inputs of another length, which the model takes too, give another number."""
        found = set[Spot]()
        untold = [spot for spot in self.channels if all(axis is None for _, axis in self.calls[spot])]
        for less in shorter(arguments) if untold else ():
            other = Run(linked, untold, less, once=True)
            if other._ended:
                found |= {spot for spot in untold if other._differs(spot, self.channels[spot])}
        return found

    def _differs(self, spot: Spot, channels: Channels) -> bool:
        """Whether an activation's input has another number of channels in this run."""
        shapes = (shape for shape, _ in self.calls.get(spot, ()) if -len(shape) <= channels.axis < len(shape))
        return any(shape[channels.axis] not in (channels.width, -1) for shape in shapes)

    def _run(
        self,
        linked: Linked,
        wanted: Mapping[Unit, list[Spot]],
        way: Way,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> str:
        """Note the calls that a run shows; the answer is why it ended early."""
        self.calls, self.broken, self._replayed, self._axes = {}, {}, set(), ChannelAxes()
        return attempt(linked.tracing, way, args, kwargs, self._watched(linked, wanted))

    @contextmanager
    def _watched(self, linked: Linked, wanted: Mapping[Unit, list[Spot]]) -> Iterator[None]:
        """See the arguments of every call of the units."""
        with ExitStack() as watched:
            for unit, here in wanted.items():
                watched.enter_context(self._watch(linked, unit, here))
            with self._axes:
                yield

    def _watch(self, linked: Linked, unit: Unit, spots: list[Spot]) -> AbstractContextManager[object]:
        """Inside, see the arguments of every call of a unit."""
        module, signature = linked.modules[unit.path], linked.tracing.signature(unit.path, unit.method)
        wanted: dict[fx.Node, list[Spot]] = {}
        for spot in spots:
            if z := activation_input(spot.node):
                wanted.setdefault(z, []).append(spot)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if signature is None or not self._is_new(linked, unit, signature, args, kwargs):
                return
            found: dict[Spot, Call] = {}
            complex_ones: set[Spot] = set()

            def show(node: fx.Node, value: Tensor) -> None:
                for spot in wanted.get(node, ()):
                    found[spot] = _shape(value), self._axes.of(value)
                    complex_ones.update([spot] if value.is_complex() else [])

            try:
                replay(module, linked.graphs[unit].graph, bound_to_placeholders(signature, args, kwargs), show)
            except Exception as error:  # the graph is not what the forward does, on these arguments: that does go on
                self.broken[unit] = in_short(error)
                return
            self.complex |= complex_ones
            for spot, call in found.items():
                self.calls.setdefault(spot, {})[call] = None

        if unit.method == "forward":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        original = getattr(module, unit.method)

        def reporting(*args: Any, **kwargs: Any) -> Any:
            before(module, args, kwargs)
            return original(*args, **kwargs)

        return shadowed(module, unit.method, reporting)

    def _is_new(
        self, linked: Linked, unit: Unit, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call of a unit may show other shapes than those before; it is noted, and counts as shown."""
        met = (unit, *map(self._in_short, tree_leaves((args, kwargs))))
        if met in self._replayed:
            return False
        again = unit in self._replayed and unit.method == "forward"
        if again and linked.unit_called(unit.path, call_of(signature, args, kwargs)) != unit:
            return False
        self._replayed |= {unit, met}
        return True

    def _in_short(self, argument: Any) -> Hashable:
        """What of an argument tells the shapes that follow, and their channels."""
        if isinstance(argument, Tensor):
            return _shape(argument), self._axes.of(argument)
        return argument if isinstance(argument, int | float | str) else type(argument).__name__


def _shape(value: Tensor) -> Shape:
    """A value's shape; -1 for a size that only values tell."""
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)


def _agreed(calls: Sequence[Call]) -> Channels | None:
    """The channels that the values of all these calls have; None where they differ."""
    shapes, told = [shape for shape, _ in calls], {axis for _, axis in calls if axis is not None}
    if told:
        from_front = {len(shape) + axis for shape, axis in calls if axis is not None}
        axes = [min(each) for each in (told, from_front) if len(each) == 1]
    else:
        pictures = [len(shape) in (4, 5) for shape in shapes]
        axes = [1] if all(pictures) else [-1, 1] if any(pictures) else [-1]
    for axis in axes:
        widths = {shape[axis] if -len(shape) <= axis < len(shape) else -1 for shape in shapes}
        if len(widths) == 1 and -1 not in widths:
            return Channels(widths.pop(), axis)
    return None


def _may_be_rows(spot: Spot, channels: Channels, calls: Iterable[Call], rows: int) -> bool:
    """Whether the channels that nothing told may be the rows of a batch of so many."""
    z = activation_input(spot.node)
    if z is None or takes_no_argument(z) or any(axis is not None for _, axis in calls):
        return False
    return any(len(shape) == 1 for shape, _ in calls) or (channels.width == rows > 1 and channels.axis < 0)
