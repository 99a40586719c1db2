"""How modules are called in a run of the model on example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from .calls import Call, call_of
from .runs import attempt, ways
from .trace import Tracing

MOST = 16  # ways of calling one module that are noted: in others it is traced when it is called so


@dataclass(frozen=True, slots=True)
class Observed:
    """The distinct calls of each module that a run showed, in order; none, and the reason, where no run came to its end.

    What a run that broke off has shown is not used: the calls that it did not come to may be other ones.
    """

    calls: Mapping[str, list[Call]] = field(default_factory=dict)
    failure: str = ""


def observed(tracing: Tracing, paths: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observed:
    """Run the model, and note how the modules at these paths are called.

    The run is one on values where it can be: a model may ask whether its inputs have any, and call others than usual if not.
    """
    signatures = {path: signature for path in paths if (signature := tracing.signature(path)) is not None}
    failures: list[str] = []
    for way in reversed(ways(tracing, args, kwargs)):
        found: dict[str, dict[str, Call]] = {}
        failure = attempt(tracing, way, args, kwargs, _watched(tracing, signatures, found))
        if not failure:
            return Observed({path: [*calls.values()][:MOST] for path, calls in found.items()})
        failures.append(failure)
    return Observed(failure=failures[0])


@contextmanager
def _watched(
    tracing: Tracing, signatures: Mapping[str, inspect.Signature], found: dict[str, dict[str, Call]]
) -> Iterator[None]:
    """Note the calls that the modules get meanwhile, by their keys."""
    with ExitStack() as hooks:
        for path, signature in signatures.items():
            noting = _noting(signature, found.setdefault(path, {}))
            hooks.enter_context(tracing.modules[path].register_forward_pre_hook(noting, with_kwargs=True))
        yield


def _noting(signature: inspect.Signature, calls: dict[str, Call]) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map(lambda value: value, (args, kwargs))  # the lists and dicts in them may change later
        call = call_of(signature, args, kwargs)
        if call is not None:
            calls.setdefault(call.key(), call)

    return before
