"""Channels from example inputs: where provenance does not settle them, one run without values tells the shapes."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .activations import activation_input
from .axes import ChannelAxes
from .calls import bound_to_placeholders, call_of
from .channels import Channels
from .fakes import on_fakes
from .link import Linked
from .outside import Kept, inherited_values
from .source import asks_device
from .units import ExampleInputs, Spot, Unit

Shape = tuple[int, ...]
Call = tuple[Shape, int | None]  # the shape of a value, and the axis of its channels where that was told, from the end


class Run:
    """What a run of the model on copies of the inputs without values told; nothing is computed, and no memory is used.

    It is tried on the meta device, then, since a model may mix in tensors of its own, on fakes, and where the model asks
    for values, which neither have, on the inputs themselves.

    Attributes:
        channels: the channels of each activation's input, along the axis that the map or the norm tells which it comes
            from; where none does, along axis 1 of a value of four or five axes, and along the last of any other. One that
            has four or five axes in some calls only has them along the last where these agree, and else along axis 1.
        calls: the shapes that each activation's input had, over all calls, and the axes that were told.
        complex: the activations whose input was complex in some call.
        failure: why the run ended early, if it did; "" otherwise.
    """

    def __init__(self, linked: Linked, spots: Iterable[Spot], inputs: ExampleInputs) -> None:
        self.channels: dict[Spot, Channels] = {}
        self.calls: dict[Spot, dict[Call, None]] = {}
        self.complex: set[Spot] = set()
        self.failure = ""
        self._replayed: set[Hashable] = set()
        self._axes = ChannelAxes()
        wanted: dict[Unit, list[Spot]] = {}
        for spot in spots:
            wanted.setdefault(spot.unit, []).append(spot)
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        ways: list[Way] = [_on_fakes]
        if not any(map(asks_device, linked.tracing.functions())):
            ways.insert(0, _on_meta)
        if not _has_fakes(linked.model, (args, kwargs)):  # else a run on values is out of the question
            ways.append(_on_values)
        for way in ways:
            self.failure = self._run(linked, wanted, way, args, kwargs)
            told = self.calls.keys() >= set(itertools.chain(*wanted.values()))
            if told:
                self.failure = ""
            if not self.failure and (told or way is not _on_meta):
                break
        self.channels = {spot: found for spot, calls in self.calls.items() if (found := _agreed([*calls]))}

    def _run(
        self,
        linked: Linked,
        wanted: Mapping[Unit, list[Spot]],
        way: Way,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> str:
        """Note the calls that a run shows; the answer is why it ended early."""
        self.calls, self._replayed, self._axes = {}, set(), ChannelAxes()
        with _left_as_it_was(linked), torch.random.fork_rng(devices=[]), torch.no_grad():
            undo = [self._watch(linked, unit, here) for unit, here in wanted.items()]
            try:
                with self._axes:
                    way(linked.model.eval(), args, kwargs)
            except Exception as error:  # the user's model on such inputs may raise anything; what was seen still holds
                return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            finally:
                for put_back in reversed(undo):
                    put_back()
        return ""

    def _watch(self, linked: Linked, unit: Unit, spots: list[Spot]) -> Callable[[], None]:
        """See the arguments of every call of a unit; the answer ends that."""
        module, signature = linked.modules[unit.path], linked.tracing.signature(unit.path, unit.method)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if signature is None or not self._is_new(linked, unit, signature, args, kwargs):
                return
            replay = _replay(linked, module, spots, signature, args, kwargs, self._axes)
            self.complex |= replay.complex
            for spot, call in replay.found.items():
                self.calls.setdefault(spot, {})[call] = None

        if unit.method == "forward":
            return module.register_forward_pre_hook(before, with_kwargs=True).remove
        return _shadow(module, unit.method, before)

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


def _shadow(module: nn.Module, method: str, before: Callable[..., None]) -> Callable[[], None]:
    """Let a module hold a method of its own that reports each call first; the answer takes it away again."""
    own, original = dict(module.__dict__), getattr(module, method)

    def reporting(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        return original(*args, **kwargs)

    def put_back() -> None:
        del module.__dict__[method]
        if method in own:
            module.__dict__[method] = own[method]

    module.__dict__[method] = reporting
    return put_back


def _replay(
    linked: Linked,
    module: nn.Module,
    spots: list[Spot],
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: ChannelAxes,
) -> _Replay:
    """Run the owner's graph on the arguments of its forward, and read the shapes of the activations' inputs."""
    graph = linked.graphs[spots[0].unit].graph
    given = bound_to_placeholders(signature, args, kwargs)
    values = [given.get(str(node.target)) for node in graph.nodes if node.op == "placeholder"]
    wanted: dict[fx.Node, list[Spot]] = {}
    for spot in spots:
        if z := activation_input(spot.node):
            wanted.setdefault(z, []).append(spot)
    replay = _Replay(module, wanted, graph, axes)
    replay.run(*values)
    return replay


class _Replay(fx.Interpreter):
    def __init__(
        self, module: nn.Module, wanted: dict[fx.Node, list[Spot]], graph: fx.Graph, axes: ChannelAxes
    ) -> None:
        super().__init__(module, graph=graph)
        self.wanted, self.axes = wanted, axes
        self.found: dict[Spot, Call] = {}
        self.complex: set[Spot] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, Tensor) and value.dim():
            self.found |= dict.fromkeys(self.wanted[n], (_shape(value), self.axes.of(value)))
            self.complex |= set(self.wanted[n]) if value.is_complex() else set()
        return value


@contextmanager
def _left_as_it_was(linked: Linked) -> Iterator[None]:
    """Put everything back that a run leaves behind on the modules: their mode, caches, and buffers that it replaced."""
    kept, dice = Kept(), random.getstate()
    for module in linked.model.modules():
        kept.keep(module)
    for cls in _classes(linked.model):
        for value in inherited_values(cls):
            kept.keep(value)
    for function in linked.tracing.functions():
        kept.keep_surroundings(function)
    try:
        yield
    finally:
        kept.put_back()
        random.setstate(dice)


Way = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object]


def _on_meta(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the model on the meta device."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors, args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), (own, args, kwargs))
    torch.func.functional_call(model, tensors, args, kwargs)


def _on_fakes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the model on fake inputs, which take the tensors of a model as they are."""
    with _buffers_kept(model), on_fakes() as fake:
        args, kwargs = tree_map_only(Tensor, fake.from_tensor, (args, kwargs))
        model(*args, **kwargs)


def _on_values(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the model on copies of the inputs."""
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    with _buffers_kept(model):
        model(*args, **kwargs)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the values of the buffers back that a run changes: one on fakes may change them too."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _classes(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of a model's modules whose code is Python."""
    return {type(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)}


def _has_fakes(model: nn.Module, inputs: Any) -> bool:
    """Whether a real run is out of the question: something is on the meta device."""
    tensors = itertools.chain(model.parameters(), model.buffers(), tree_leaves(inputs))
    return any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)
