"""Runs of a model on example inputs that leave it as it was: without values where the model allows that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .dice import unrolled
from .errors import in_short
from .fakes import on_fakes
from .matrices import is_sharded
from .outside import Kept, inherited_values
from .source import asks_device
from .trace import Tracing

Way = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object]


def ways(tracing: Tracing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Way]:
    """The ways to run a model on copies of the inputs, to be tried in this order.

    It is the meta device first, where nothing is computed, and no memory used; then, since a model may mix in tensors of
    its own, fakes; and where the model asks for values, which neither have, the inputs themselves. What shards a model
    would take the first two's tensors for its own, so that one is run on values alone.
    """
    if any(map(is_sharded, tracing.model.parameters())):
        return [on_values]
    found: list[Way] = [on_fakes_of]
    if not any(map(asks_device, tracing.functions())):
        found.insert(0, on_meta)
    if not _has_fakes(tracing.model, (args, kwargs)):  # else a run on values is out of the question
        found.append(on_values)
    return found


def attempt(
    tracing: Tracing, way: Way, args: tuple[Any, ...], kwargs: dict[str, Any], watched: AbstractContextManager[None]
) -> str:
    """Run the model in eval mode in one way, `watched` meanwhile, and leave all as it was.

    Returns:
        Why the run ended early; "" if it did not.
    """
    model = tracing.model
    with _left_as_it_was(tracing, (args, kwargs)), _drawn_again(model, (args, kwargs)), torch.no_grad():
        try:
            with in_eval_mode(model), watched:
                way(model, args, kwargs)
        except Exception as error:  # the user's model on such inputs may raise anything; what was seen still holds
            return in_short(error)
    return ""


def on_meta(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the model on the meta device."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors, args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().to("meta"), (own, args, kwargs))
    torch.func.functional_call(model, tensors, args, kwargs)


def on_fakes_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the model on fake inputs, which take the tensors of a model as they are."""
    with _values_kept(model.buffers()), on_fakes() as fake:
        args, kwargs = tree_map_only(Tensor, fake.from_tensor, (args, kwargs))
        model(*args, **kwargs)


def on_values(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the model on copies of the inputs."""
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    with _values_kept(_may_be_written(model)):
        model(*args, **kwargs)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a run. Each module is told so itself: a `train` of a model's own may do more, as to merge weights."""
    training = {module: module.training for module in model.modules()}
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module, mode in training.items():
            if module.training != mode:
                module.training = mode


class _Replay(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph, show: Callable[[fx.Node, Tensor], None]) -> None:
        super().__init__(module, graph=graph)
        self._show = show

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._show(n, value)
        return value


def replay(
    module: nn.Module, graph: fx.Graph, given: Mapping[str, Any], show: Callable[[fx.Node, Tensor], None]
) -> Any:
    """Run a module's graph on what its placeholders stand for; `show` sees every tensor on the way."""
    values = [given.get(str(node.target)) for node in graph.nodes if node.op == "placeholder"]
    return _Replay(module, graph, show).run(*values)


@contextmanager
def shadowed(module: nn.Module, method: str, call: Callable[..., Any]) -> Iterator[None]:
    """Let a module hold `call` by the name of a method; a callable that it held itself is back in its place afterwards."""
    own = dict(module.__dict__)
    module.__dict__[method] = call
    try:
        yield
    finally:
        if method in own:
            module.__dict__[method] = own[method]
        else:
            del module.__dict__[method]


@contextmanager
def _left_as_it_was(tracing: Tracing, inputs: Any) -> Iterator[None]:
    """Put everything back that a run leaves behind on the modules: their mode, caches, and buffers that it replaced; and
    in what it was given.
    """
    kept = Kept()
    _reshard(tracing.model)
    for module in tracing.model.modules():
        kept.keep(module)
    for cls in _classes(tracing.model):
        for value in inherited_values(cls):
            kept.keep(value)
    for function in tracing.functions():
        kept.keep_surroundings(function)
    for given in tree_leaves(inputs):
        kept.keep(given)
    try:
        yield
    finally:
        _reshard(tracing.model)
        kept.put_back()


@contextmanager
def _values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the values of these tensors back that a run changes: one on fakes may change them too. Some get another size."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            if tensor.shape != value.shape:
                tensor.resize_(value.shape)
            tensor.copy_(value)


def _may_be_written(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that a forward may write into: buffers, others that modules hold, and parameters: a teacher's are a
    mean of the student's, and some start at what the first batch tells. No shards that are trained: they are large.
    """
    yield from model.buffers()
    yield from (each for each in model.parameters() if not (each.requires_grad and is_sharded(each)))
    registered = {"_parameters", "_buffers", "_modules"}
    held = [value for module in model.modules() for name, value in vars(module).items() if name not in registered]
    yield from (leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor))


@contextmanager
def _drawn_again(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Put every generator back that a run may draw from: torch's, NumPy's and Python's, and those that are held or given."""
    held = tree_leaves(([vars(module) for module in model.modules()], inputs))
    own = [(each, each.get_state()) for each in held if isinstance(each, torch.Generator)]
    try:
        with unrolled(itertools.chain(model.parameters(), model.buffers())):
            yield
    finally:
        for generator, state in own:
            generator.set_state(state)


def _reshard(model: nn.Module) -> None:
    """Let a model that FSDP2 sharded hold its shards again, where a forward has left whole parameters in their places."""
    for module in model.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):  # its import would take 0.3 s
            module.reshard()  # type: ignore[operator]


def _classes(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of a model's modules whose code is Python."""
    return {type(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)}


def _has_fakes(model: nn.Module, inputs: Any) -> bool:
    """Whether a real run is out of the question: something is on the meta device."""
    tensors = itertools.chain(model.parameters(), model.buffers(), tree_leaves(inputs))
    return any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)
