"""What merged graphs (`passes/merge.py`) call in a run: questions, picks, calls under a condition; and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import fx

from .errors import UntraceableError


def truth(value: Any) -> bool:
    """The answer to a question.

    >>> truth(3)
    True
    """
    return True if value else False  # noqa: SIM210 - torch's compiler keeps bool(value) open, and can't compare it


def pick(condition: bool, yes: Any, no: Any) -> Any:
    """One of two values.

    >>> pick(2 > 1, "more", "less")
    'more'
    """
    return yes if condition else no


@cache
def conditional(call: Callable[..., Any] | str) -> Callable[..., Any]:
    """The function, or method of that name, of what follows a condition and the answer with which it is called; else None.

    >>> conditional("upper")(True, True, "a"), conditional("upper")(False, True, "a")
    ('A', None)
    """

    def run(condition: bool, answer: bool, /, *args: Any, **kwargs: Any) -> Any:
        if condition != answer:
            return None
        return getattr(args[0], call)(*args[1:], **kwargs) if isinstance(call, str) else call(*args, **kwargs)

    run.__name__ = run.__qualname__ = f"{call if isinstance(call, str) else getattr(call, '__name__', 'call')}_if"
    run.__dict__["within"] = call
    return run


def raising(error: Exception) -> Callable[[bool, bool], None]:
    """A function that raises the forward's own error where a condition has an answer; errors that are alike have one.

    What an assertion says of values of the trace, as in `assert len(x) == 2, x.shape`, it says by their names.

    Raises:
        UntraceableError: the error holds more than plain data, such as a value of the trace.
    """
    kind: Any = type(error)
    args = tuple(map(_told, error.args)) if kind is AssertionError else error.args
    if not all(map(_is_plain, (*args, *vars(error).values()))):
        raise UntraceableError(f"its forward raises a {kind.__name__} that holds a value")
    return _raising(kind, args, tuple(vars(error).items()))


def _told(value: Any) -> Any:
    """What an error holds, with the names of traced values in their places."""
    if isinstance(value, tuple | list):
        return tuple(map(_told, value))
    return f"<{value.node}>" if isinstance(value, fx.Proxy) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


_PLAIN = (str, int, float, bool, type(None))


@cache
def _raising(kind: type[Exception], args: tuple[Any, ...], held: tuple[tuple[str, Any], ...]) -> Callable[..., None]:
    def raise_if(condition: bool, answer: bool) -> None:
        if condition == answer:
            error = kind.__new__(kind, *args)  # its __init__ may take other things than it keeps
            error.args = args
            error.__dict__.update(held)
            raise error

    return raise_if


class Step(NamedTuple):
    """What a node calls, without the conditions under which it does."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    conditions: tuple[tuple[fx.Node, bool], ...] = ()


def step_of(node: fx.Node) -> Step:
    """What a node calls: of a call in one branch alone (`passes/merge.py`), the call itself, and where it is made."""
    target: Any = node.target
    args, conditions = node.args, list[tuple[fx.Node, bool]]()
    while hasattr(target, "within"):
        condition, answer, *rest = args
        conditions.append((condition, answer))  # type: ignore[arg-type]  # as the graph was merged
        target, args = target.within, tuple(rest)
    op = "call_method" if conditions and isinstance(target, str) else node.op
    return Step(op, target, args, dict(node.kwargs), tuple(conditions))


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a call takes, but for the conditions under which it is made, or by which it picks."""
    step, found = step_of(node), dict[fx.Node, fx.Node]()
    args = step.args[1:] if step.target is pick else step.args
    fx.map_arg((args, step.kwargs), lambda inner: found.setdefault(inner, inner))
    return list(found)
