"""Functions that take values or sizes and are called in a graph as they are: those of einops and math, and torch's own that
look into what they take, for sequences of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import fx
from torch.nn.utils import rnn
from torch.utils._pytree import tree_leaves

from .source import nested

LIBRARIES = ("einops", "math")
_OF_SEQUENCES = (rnn.pack_padded_sequence, rnn.pad_packed_sequence, rnn.pack_sequence, rnn.pad_sequence)

Called = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def calls_become(called: Called, functions: Iterable[FunctionType]) -> Iterator[None]:
    """While this lasts, `called` answers where one of the functions calls such a library with a traced value."""
    originals = {(id(space), name): (space, name, space[name]) for space, name in _named(functions)}
    for space, name, original in originals.values():
        space[name] = _calling(original, called)
    try:
        yield
    finally:
        for space, name, original in originals.values():
            space[name] = original


def _named(functions: Iterable[FunctionType]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the functions find what they name of such a library."""
    for function in functions:
        names, space = {name for code in nested(function.__code__) for name in code.co_names}, function.__globals__
        yield from ((vars(rnn), each.__name__) for each in _OF_SEQUENCES if each.__name__ in names)
        for name in names:
            value = space.get(name)
            if type(value) is ModuleType and value.__name__ in LIBRARIES:
                yield from ((vars(value), each) for each in names if _is_function(vars(value).get(each)))
            elif _is_function(value):
                yield space, name


def _is_function(value: Any) -> bool:
    """Whether it is one of the functions."""
    if any(value is each for each in _OF_SEQUENCES):
        return True
    library = str(getattr(value, "__module__", "")).split(".")[0]
    return library in LIBRARIES and not isinstance(value, type) and callable(value)


def _calling(original: Callable[..., Any], called: Called) -> Callable[..., Any]:
    def calling(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs)))
        return called(original, args, kwargs) if traced else original(*args, **kwargs)

    return calling
