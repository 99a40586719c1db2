"""Shapes from example inputs: one run on fake tensors tells the shape of every value that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from .calls import bound_to_placeholders
from .channels import Channels
from .link import ExampleInputs, Linked, Spot, Unit


class Run:
    """What a run of the model on fake copies of the inputs told; nothing is computed, and no memory is used.

    Attributes:
        shapes: the shapes of the values asked for, where the run reached them.
        failure: why the run ended early, if it did; "" otherwise.
    """

    def __init__(self, linked: Linked, values: Iterable[Spot], inputs: ExampleInputs) -> None:
        self.shapes: dict[Spot, tuple[int, ...]] = {}
        self.failure = ""
        self._linked = linked
        self._wanted: dict[Unit, set[fx.Node]] = {}
        self._replayed: set[Unit] = set()
        for unit, node in values:
            self._wanted.setdefault(unit, set()).add(node)
        from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and rarely needed

        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        with _eval_mode(linked.model), self._watching(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            try:
                with torch.no_grad():
                    linked.model(
                        *tree_map_only(Tensor, fake.from_tensor, args),
                        **tree_map_only(Tensor, fake.from_tensor, kwargs),
                    )
            except Exception as error:  # the user's model on fake tensors may raise anything; what was seen still holds
                self.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"

    def channels(self, spot: Spot) -> Channels | None:
        """The channels of a value: along axis 1 where it has four or five axes, else along its last."""
        shape = self.shapes.get(spot)
        if not shape:
            return None
        axis = 1 if len(shape) in (4, 5) else -1
        return Channels(shape[axis], axis)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside, the forwards and helper methods that hold wanted values are replayed when they are first called."""
        modules = {path: self._linked.modules[path] for path in {unit.path for unit in self._wanted}}
        hooks = [
            module.register_forward_pre_hook(partial(self._before_forward, path), with_kwargs=True)
            for path, module in modules.items()
        ]
        helpers = [unit for unit in self._wanted if unit.method != "forward"]
        for unit in helpers:
            modules[unit.path].__dict__[unit.method] = self._replayed_first(unit)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for unit in helpers:
                del modules[unit.path].__dict__[unit.method]

    def _before_forward(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        unit = self._linked.unit_called(path, args, kwargs)
        if unit is not None:
            self._replay(unit, args, kwargs)

    def _replayed_first(self, unit: Unit) -> Callable[..., Any]:
        original = getattr(self._linked.modules[unit.path], unit.method)

        def method(*args: Any, **kwargs: Any) -> Any:
            self._replay(unit, args, kwargs)
            return original(*args, **kwargs)

        return method

    def _replay(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the unit's graph on the arguments of its method, and read the shapes of the wanted values."""
        wanted = self._wanted.get(unit)
        signature = self._linked.tracing.signature(unit.path, unit.method)
        if not wanted or signature is None or unit in self._replayed:
            return
        self._replayed.add(unit)  # before the run: children that are called below end here
        graph = self._linked.graphs[unit].graph
        given = bound_to_placeholders(signature, args, kwargs)
        values = [given.get(str(node.target)) for node in graph.nodes if node.op == "placeholder"]
        _Replay(self._linked.modules[unit.path], graph, unit, wanted, self.shapes).run(*values)


class _Replay(fx.Interpreter):
    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        unit: Unit,
        wanted: set[fx.Node],
        shapes: dict[Spot, tuple[int, ...]],
    ) -> None:
        super().__init__(module, graph=graph)
        self.unit, self.wanted, self.shapes = unit, wanted, shapes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, Tensor):
            self.shapes[Spot(self.unit, n)] = tuple(map(int, value.shape))
        return value


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a run that must leave running statistics alone."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
