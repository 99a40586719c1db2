"""The shapes of a model's values, for people to see: one run that computes nothing, in which each graph runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .calls import bound_to_placeholders, call_of
from .errors import in_short
from .fakes import on_fakes
from .link import Linked
from .runs import in_eval_mode, replay, shadowed
from .units import ExampleInputs, Spot, Unit, arguments_of


class ValueShapes:
    """What a run of the model on tensors without data showed; nothing is computed, and no memory is used.

    Attributes:
        shapes: the shapes of the values asked for, where the run reached them.
        flops: FLOPs of this forward pass in its matrix products and convolutions; None where the run ended early.
        failure: why the run ended early, if it did; "" otherwise.
    """

    def __init__(self, linked: Linked, values: Iterable[Spot], inputs: ExampleInputs) -> None:
        self.shapes: dict[Spot, tuple[int, ...]] = {}
        self.flops: int | None = None
        self.failure = ""
        self._linked = linked
        self._wanted: dict[Unit, set[fx.Node]] = {}
        self._replayed: set[Unit] = set()
        for unit, node in values:
            self._wanted.setdefault(unit, set()).add(node)
        args, kwargs = arguments_of(inputs)
        counter = _Flops()
        with (
            in_eval_mode(linked.model),
            self._watching(),
            _without_data(linked.model, (args, kwargs)) as (args, kwargs),
        ):
            try:
                with counter:
                    linked.model(*args, **kwargs)
                self.flops = counter.total
            except Exception as error:  # the user's model may raise anything here; what was seen still holds
                self.failure = in_short(error).rstrip(".: ")

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside, the graphs of the methods that hold wanted values run in place of their first calls."""
        with ExitStack() as watched:
            for path, method in {(unit.path, unit.method) for unit in self._wanted}:
                graph_first = self._graph_first(path, method)
                watched.enter_context(shadowed(self._linked.modules[path], method, graph_first))
            yield

    def _graph_first(self, path: str, method: str) -> Callable[..., Any]:
        original, signature = getattr(self._linked.modules[path], method), self._linked.tracing.signature(path, method)

        @wraps(original)  # code may ask how many arguments it takes
        def call(*args: Any, **kwargs: Any) -> Any:
            if signature is None:
                return original(*args, **kwargs)
            unit: Unit | None = Unit(path, 0, method)
            if method == "forward":
                unit = self._linked.unit_called(path, call_of(signature, args, kwargs))
            if unit not in self._wanted or unit in self._replayed:
                return original(*args, **kwargs)
            self._replayed.add(unit)  # before the run: children that are called below end here
            return self._replay(unit, bound_to_placeholders(signature, args, kwargs))

        return call

    def _replay(self, unit: Unit, given: Mapping[str, Any]) -> Any:
        """Run the unit's graph on the arguments of its method, and read the shapes of the wanted values."""

        def show(node: fx.Node, value: Tensor) -> None:
            if node in self._wanted[unit]:
                self.shapes[Spot(unit, node)] = tuple(map(int, value.shape))

        return _plain(replay(self._linked.modules[unit.path], self._linked.graphs[unit].graph, given, show))


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up FLOPs by the formulas of torch's own counter, which fails at a module that is given a view of a parameter."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # slow to import, and rarely needed

        super().__init__()  # type: ignore[no-untyped-call]
        self.total, self._formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def _plain(value: Any) -> Any:
    """Lists and dicts that can be changed, for fx's immutable ones: the code that called may go on with them."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_plain(item) for item in value)
    return {key: _plain(item) for key, item in value.items()} if type(value) is immutable_dict else value


@contextmanager
def _without_data(model: nn.Module, inputs: Any) -> Iterator[Any]:
    """The inputs without data, and inside, a model that runs on them without gradients: fake tensors, unless all tensors
    are on the meta device anyway, where ops take a tenth of the time.

    torch's fused inference paths, which skip a module's methods, are off.
    """
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    tensors += [*model.parameters(), *model.buffers()]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), ExitStack() as stack:
            if not tensors or not all(tensor.is_meta for tensor in tensors):
                fake = stack.enter_context(on_fakes())
                inputs = tree_map_only(Tensor, fake.from_tensor, inputs)
            yield inputs
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
