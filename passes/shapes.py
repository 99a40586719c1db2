"""Channels from example inputs: where provenance does not settle them, one run on fake tensors tells the shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from .activations import activation_input
from .calls import bound_to_placeholders
from .channels import Channels
from .link import ExampleInputs, Linked, Spot


class Run:
    """What a run of the model on fake copies of the inputs told; nothing is computed, and no memory is used.

    Attributes:
        channels: the channels of each activation's input. A value of four or five axes has its channels along axis 1,
            any other along its last.
        failure: why the run ended early, if it did; "" otherwise.
    """

    def __init__(self, linked: Linked, spots: Iterable[Spot], inputs: ExampleInputs) -> None:
        self.channels: dict[Spot, Channels] = {}
        self.failure = ""
        wanted: dict[str, list[Spot]] = {}
        for spot in spots:
            wanted.setdefault(spot.unit.path, []).append(spot)
        from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and rarely needed

        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        with _eval_mode(linked.model), FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            hooks = [
                linked.modules[path].register_forward_pre_hook(self._watch(linked, here), with_kwargs=True)
                for path, here in wanted.items()
            ]
            try:
                linked.model(
                    *tree_map_only(Tensor, fake.from_tensor, args), **tree_map_only(Tensor, fake.from_tensor, kwargs)
                )
            except Exception as error:  # the user's model on fake tensors may raise anything; what was seen still holds
                self.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            finally:
                for hook in hooks:
                    hook.remove()

    def _watch(self, linked: Linked, spots: list[Spot]) -> Callable[..., None]:
        def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            missing = [spot for spot in spots if spot not in self.channels]
            if not missing:
                return
            signature = linked.tracing.signature(missing[0].unit.path)
            if signature is not None and missing[0].unit.method == "forward":
                self.channels |= dict.fromkeys(missing, Channels(0, 0))  # children that are called below end here
                self.channels |= _replay(linked, module, missing, signature, args, kwargs)

        return before_forward


def _replay(
    linked: Linked,
    module: nn.Module,
    spots: list[Spot],
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[Spot, Channels]:
    """Run the owner's graph on the arguments of its forward, and read the shapes of the activations' inputs."""
    graph = linked.graphs[spots[0].unit].graph
    given = bound_to_placeholders(signature, args, kwargs)
    values = [given.get(str(node.target)) for node in graph.nodes if node.op == "placeholder"]
    replay = _Replay(module, {z: spot for spot in spots if (z := activation_input(spot.node))}, graph)
    replay.run(*values)
    return replay.found


class _Replay(fx.Interpreter):
    def __init__(self, module: nn.Module, wanted: dict[fx.Node, Spot], graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.wanted = wanted
        self.found: dict[Spot, Channels] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, Tensor) and value.dim():
            axis = 1 if value.dim() in (4, 5) else -1
            self.found[self.wanted[n]] = Channels(value.shape[axis], axis)
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
