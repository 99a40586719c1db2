"""Functions of other libraries that take values or sizes: einops and math. A graph calls them as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

LIBRARIES = ("einops", "math")

Called = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def calls_become(called: Called, functions: Iterable[FunctionType]) -> Iterator[None]:
    """While this lasts, `called` answers where one of the functions calls such a library with a traced value."""
    with ExitStack() as stack:
        for function in functions:
            names = function.__code__.co_names
            for name in names:
                value = function.__globals__.get(name)
                if isinstance(value, ModuleType) and value.__name__ in LIBRARIES:
                    for attribute in names:
                        stack.enter_context(_replaced(vars(value), attribute, called))
                else:
                    stack.enter_context(_replaced(function.__globals__, name, called))
        yield


@contextmanager
def _replaced(space: dict[str, Any], name: str, called: Called) -> Iterator[None]:
    original = space.get(name)
    library = str(getattr(original, "__module__", "")).split(".")[0]
    if library not in LIBRARIES or isinstance(original, type) or not callable(original):
        yield
        return

    def calling(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs)))
        return called(original, args, kwargs) if traced else original(*args, **kwargs)

    space[name] = calling
    try:
        yield
    finally:
        space[name] = original
