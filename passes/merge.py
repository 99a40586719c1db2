"""Two graphs of one forward, for the two answers to a question that it asks, as one graph that asks it in a run."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch.nn.functional as F
from torch import fx
from torch.fx.operator_schemas import get_signature_for_torch_op

from .activations import call_activation
from .calls import leaves
from .choices import conditional, pick, truth
from .errors import UntraceableError
from .facts import is_fact
from .nodes import Verbatim, names_a_write, new_node

ASKED = "asked"  # in a node's meta: which question of the trace it answers, counted from 0


def merged(yes: fx.Graph, no: fx.Graph, index: int) -> fx.Graph:
    """The one graph of the two that a question parts: `index` says which of the trace's.

    Raises:
        UntraceableError: they call other modules or activations, or write in place differently.
    """
    return _Merged(yes, no, index).graph


class _Merged:
    def __init__(self, yes: fx.Graph, no: fx.Graph, index: int) -> None:
        self.graph, self.index = fx.Graph(), index
        self.copies: dict[bool, dict[fx.Node, fx.Node]] = {True: {}, False: {}}
        self.question: fx.Node | None = None
        self.picked: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.signatures: dict[fx.Node, str] = {}
        self.texts: dict[str, str] = {}
        ones, others = list(yes.nodes), list(no.nodes)
        asked = next(place for place, node in enumerate(ones) if node.meta.get(ASKED) == index)
        for one, other in zip(ones[: asked + 1], others, strict=False):
            if _kind(one) != _kind(other):
                raise UntraceableError("its forward does not do the same again")
            self.both(one, other)
        self.question = self.copies[True][ones[asked]]
        for rest, those, pair in _stretches(ones[asked + 1 :], others[asked + 1 :]):
            self.stretch(rest, those)
            self.both(*pair)

    def stretch(self, rest: list[fx.Node], those: list[fx.Node]) -> None:
        """Calls between two that both graphs make: first what is the same, and then what calls the same on other values."""
        same = [[self.signature(node, answer) for node in nodes] for nodes, answer in ((rest, True), (those, False))]
        for equal, (start, stop), (begin, end) in _blocks(*same):
            if equal:
                self.pairs(rest[start:stop], those[begin:end])
                continue
            kinds = [list(map(_movable_kind, nodes)) for nodes in (rest[start:stop], those[begin:end])]
            for alike, (first, last), (other_first, other_last) in _blocks(*kinds):
                ones, others = rest[start + first : start + last], those[begin + other_first : begin + other_last]
                if alike:
                    self.pairs(ones, others)
                    continue
                for node in ones:
                    self.alone(node, True)
                for node in others:
                    self.alone(node, False)

    def pairs(self, ones: list[fx.Node], others: list[fx.Node]) -> None:
        for one, other in zip(ones, others, strict=True):
            self.both(one, other)

    def signature(self, node: fx.Node, answer: bool) -> str:
        """A text that is the same for calls of one thing on the same values."""
        copy = self.copies[answer].get(node)
        if copy is not None:
            return f"={copy.name}"
        if node not in self.signatures:
            given = fx.map_arg((node.args, node.kwargs), lambda inner: Verbatim(self.signature(inner, answer)))  # type: ignore[arg-type,return-value]
            self.signatures[node] = f"{len(self.texts)}"
            text = f"{node.op} {node.target!r} {given}"
            self.signatures[node] = self.texts.setdefault(text, self.signatures[node])
        return self.signatures[node]

    def both(self, one: fx.Node, other: fx.Node) -> None:
        """What both graphs call; an argument that one of them leaves out has its default there."""
        names = dict.fromkeys((*one.kwargs, *other.kwargs))
        alike = one.kwargs.keys() == other.kwargs.keys() or _take(one, names)
        if not alike or not all(_has_default(one, n) for n in names if n not in one.kwargs or n not in other.kwargs):
            self.alone(one, True)
            self.alone(other, False)
            return
        args = self.agreed(one.args, other.args)
        given = [{n: node.kwargs[n] if n in node.kwargs else _default(node, n) for n in names} for node in (one, other)]
        kwargs = self.agreed(*given)
        copy = self.add(one, one.target, args, kwargs)
        self.copies[True][one] = self.copies[False][other] = copy

    def alone(self, node: fx.Node, answer: bool) -> None:
        """What one graph calls, and the other does not."""
        args, kwargs = self.copied((node.args, dict(node.kwargs)), answer)
        target: Any = node.target
        if _why_bound(node):
            raise UntraceableError(f"its forward branches on a traced value, and {_why_bound(node)} in one branch")
        if node.op != "get_attr":
            args, target = (self.question, answer, *args), conditional(target)
        self.copies[answer][node] = self.add(node, target, args, kwargs)

    def add(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        op = "call_function" if target is not node.target else node.op
        copy = new_node(self.graph, op, target, args, kwargs, None if op == "output" else node.name, node.type)
        if node.meta.get(ASKED, self.index) < self.index:
            copy.meta[ASKED] = node.meta[ASKED]
        return copy

    def copied(self, value: Any, answer: bool) -> Any:
        return fx.map_arg(value, self.copies[answer].__getitem__)

    def agreed(self, one: Any, other: Any) -> Any:
        """An argument where both graphs pass one, else a pick of the two."""
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            copies = self.copies[True][one], self.copies[False][other]
            return copies[0] if copies[0] is copies[1] else self.pick(*copies)
        if type(one) is type(other):
            if isinstance(one, tuple | list) and len(one) == len(other) and not hasattr(one, "_fields"):
                return type(one)(map(self.agreed, one, other))
            if isinstance(one, dict) and list(one) == list(other):
                return {key: self.agreed(value, other[key]) for key, value in one.items()}
            if isinstance(one, slice):
                return slice(*(self.agreed(getattr(one, at), getattr(other, at)) for at in ("start", "stop", "step")))
            if not any(isinstance(leaf, fx.Node) for leaf in leaves((one, other))) and _same_constant(one, other):
                return one
        return self.pick(self.copied(one, True), self.copied(other, False))

    def pick(self, yes: Any, no: Any) -> fx.Node:
        if self.question is None:
            raise UntraceableError("its forward does not do the same again")
        pair = yes, no
        known = self.picked.get(pair) if all(isinstance(each, fx.Node) for each in pair) else None
        if known is None:
            known = new_node(self.graph, "call_function", pick, (self.question, yes, no), {})
            if all(isinstance(each, fx.Node) for each in pair):
                self.picked[pair] = known
        return known


def _kind(node: fx.Node) -> Hashable:
    """What nodes must have in common to be one: what they call, and with how many arguments by position."""
    return node.op, node.target, len(node.args)


def _same_constant(one: Any, other: Any) -> bool:
    """Whether two constants of one type are the same; 0.0 and -0.0 are not, though they are equal."""
    return bool(one == other) and repr(one) == repr(other)


def _movable_kind(node: fx.Node) -> Hashable:
    """The kind of a call that may be made once on other values; a question, a fact and a pick stay by themselves."""
    apart = is_fact(node) or node.target in (pick, truth) or hasattr(node.target, "within") or node.target is getattr
    return node if apart else _kind(node)


def _blocks(
    one: Sequence[Hashable], other: Sequence[Hashable]
) -> Iterator[tuple[bool, tuple[int, int], tuple[int, int]]]:
    """Where two sequences are equal, and where not, in order."""
    for tag, start, stop, begin, end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        yield tag == "equal", (start, stop), (begin, end)


def _stretches(
    ones: list[fx.Node], others: list[fx.Node]
) -> Iterator[tuple[list[fx.Node], list[fx.Node], tuple[fx.Node, fx.Node]]]:
    """What stands between the calls that both graphs must make, and then such a pair.

    Raises:
        UntraceableError: one makes a call that the other does not.
    """
    place, there = 0, 0
    bound, those = [node for node in ones if _why_bound(node)], [node for node in others if _why_bound(node)]
    kinds, other_kinds = list(map(_kind, bound)), list(map(_kind, those))
    if kinds != other_kinds:
        surplus = (Counter(kinds) - Counter(other_kinds)) + (Counter(other_kinds) - Counter(kinds))
        why = next((_why_bound(node) for node in (*bound, *those) if _kind(node) in surplus), "calls in another order")
        raise UntraceableError(f"its forward branches on a traced value, and {why} in one branch")
    for one, other in zip(bound, those, strict=True):
        until, to = ones.index(one, place), others.index(other, there)
        yield ones[place:until], others[there:to], (one, other)
        place, there = until + 1, to + 1


def _why_bound(node: fx.Node) -> str:
    """Why a call can't stand in one branch alone; "" where it can."""
    if node.op == "output":
        return "ends"
    if node.op == "call_module":
        return "calls other modules"
    if call_activation(node) or node.target is F.scaled_dot_product_attention:
        return "calls other activations"
    return "writes in place" if names_a_write(node) or "out" in node.kwargs else ""


def _has_default(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and _default(node, name) is not inspect.Parameter.empty


def _take(node: fx.Node, names: Iterable[str]) -> bool:
    """Whether one form of the function has all these arguments: no form of torch.std has both unbiased and correction."""
    signatures = get_signature_for_torch_op(node.target) or []  # type: ignore[arg-type]  # callable, as of a function
    return any(set(names) <= set(each.parameters) for each in signatures)


def _default(node: fx.Node, name: str) -> Any:
    """The default of an argument of one of torch's functions; `inspect.Parameter.empty` where it has none."""
    signatures = get_signature_for_torch_op(node.target) or []  # type: ignore[arg-type]  # callable, as of a function
    parameters = (each.parameters[name] for each in signatures if name in each.parameters)
    return next((each.default for each in parameters), inspect.Parameter.empty)
