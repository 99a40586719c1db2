"""Branches: `if x.shape[1] > 1`, `if x.dtype != w.dtype`, `if mask.any()`. A forward is traced for both answers.

The two graphs become one (`merge`): what both do stands in it once, what one of them does runs where its answer holds, and a
value that differs is picked. An answer for which the forward raises an error of its own raises it in a run too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .choices import raising
from .errors import UntraceableError
from .facts import is_fact, is_size
from .merge import ASKED, merged
from .nodes import copied, reshapes_in_place

_QUESTIONS = 8  # in one trace
_TRACES = 32  # of one forward, for all its answers

Answers = tuple[bool, ...]


class RaisesError(UntraceableError):
    """The forward itself raises an error, for the answers of this trace."""

    def __init__(self, text: str, error: Exception) -> None:
        super().__init__(text)
        self.error = error


def follows_ours(error: BaseException | None, before: BaseException | None) -> bool:
    """Whether a forward raised an error where it caught one of the trace's: a run does not come there.

    What was handled before the trace began is no part of it.
    """
    while error is not None and error is not before:
        if isinstance(error, UntraceableError):
            return True
        error = error.__context__
    return False


@dataclass(slots=True)
class Questions:
    """What a trace was asked: whether a traced value is true. What no answer was given for is answered with yes."""

    answers: Answers = ()
    asked: dict[fx.Node, bool] = field(default_factory=dict)

    def answer(self, value: fx.Node, ask: Callable[[], fx.Node]) -> bool | None:
        """The answer; `ask` makes the node that holds it in a run. None where the forward asks too much."""
        known = self._answered(value)
        if known is not None:
            return known
        index = len(self.asked)
        if index == _QUESTIONS:
            return None
        node = ask()
        node.meta[ASKED] = index
        self.asked[node] = index >= len(self.answers) or self.answers[index]
        return self.asked[node]

    def _answered(self, value: fx.Node) -> bool | None:
        """The answer to the same question, where it was asked of a fact before."""
        if not self.asked or not is_fact(value):
            return None
        moved = reshapes_in_place(value.graph)
        same = (
            answer
            for other, answer in self.asked.items()
            if value is other.args[0] or (not moved and _same(value, other.args[0]))
        )
        return next(same, None)


class FailsError(UntraceableError):
    """What the forward does fails, after these questions of this trace."""

    def __init__(self, text: str, how: str, questions: Questions) -> None:
        super().__init__(text)
        self.how, self.asked = how, {node.args[0]: answer for node, answer in questions.asked.items()}


def over_answers(traced: Callable[[Answers], tuple[fx.Graph | RaisesError, int]]) -> fx.Graph:
    """The one graph of a forward for all answers to its questions.

    `traced` traces it for the first answers, and yes from there on; it says how many questions there were.

    Raises:
        UntraceableError: some answer leads to what no graph holds, or the graphs do not become one.
    """
    count = 0

    def below(answers: Answers) -> fx.Graph | RaisesError:
        nonlocal count
        count += 1
        if count > _TRACES:
            raise UntraceableError("its forward branches on traced values in too many ways")
        found, asked = traced(answers)
        for index in reversed(range(len(answers), asked)):
            yes = (True,) * (index - len(answers))
            found = _joined(found, below((*answers, *yes, False)), index)
        return found

    try:
        graph = below(())
    except FailsError as error:
        if not _fails_in_one_branch(error, traced):
            raise
        what = "a size" if all(map(is_size, error.asked)) else "a traced value"
        raise UntraceableError(
            f"its forward branches on {what}, and fails in one branch ({error.how}): where the branch is the same in "
            "every call, let a number or a flag that __init__ sets decide it"
        ) from error
    if isinstance(graph, RaisesError):
        raise graph
    return graph


def _fails_in_one_branch(error: FailsError, traced: Callable[[Answers], tuple[fx.Graph | RaisesError, int]]) -> bool:
    """Whether the other answer to the last question leads on: a yes is tried before a no."""
    if not error.asked:
        return False
    *before, last = error.asked.values()
    if not last:
        return True
    try:
        traced((*before, False))
    except FailsError as other:
        return len(other.asked) > len(error.asked)
    except UntraceableError:
        return False
    return True


def _joined(yes: fx.Graph | RaisesError, no: fx.Graph | RaisesError, index: int) -> fx.Graph | RaisesError:
    if not isinstance(yes, RaisesError) and not isinstance(no, RaisesError):
        return merged(yes, no, index)
    if isinstance(yes, RaisesError) and isinstance(no, RaisesError):
        return yes
    raises, graph = (yes, no) if isinstance(yes, RaisesError) else (no, yes)
    assert isinstance(raises, RaisesError) and isinstance(graph, fx.Graph)
    graph, _ = copied(graph)
    question = next(node for node in graph.nodes if node.meta.get(ASKED) == index)
    del question.meta[ASKED]
    with graph.inserting_after(question):
        graph.call_function(raising(raises.error), (question, raises is yes))
    return graph


def _same(one: Any, other: Any) -> bool:
    """Whether two nodes are one fact, asked for twice, or one value."""
    if one is other:
        return True
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return type(one) is type(other) and not isinstance(one, tuple | list | dict) and bool(one == other)
    if (one.op, one.target, len(one.args)) != (other.op, other.target, len(other.args)) or not is_fact(one):
        return False
    return not one.kwargs and not other.kwargs and all(map(_same, one.args, other.args))
