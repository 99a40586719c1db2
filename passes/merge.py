"""Two graphs of one forward, for the two answers to a question that it asks, as one graph that asks it in a run."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import torch.nn.functional as F
from torch import fx

from .activations import call_activation
from .calls import leaves
from .choices import conditional, pick
from .errors import UntraceableError
from .nodes import names_a_write, new_node

ASKED = "asked"  # in a node's meta: the how manieth question of the trace it answers


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
        ones, others = list(yes.nodes), list(no.nodes)
        asked = next(place for place, node in enumerate(ones) if node.meta.get(ASKED) == index)
        for one, other in zip(ones[: asked + 1], others, strict=False):
            if _key(one) != _key(other):
                raise UntraceableError("its forward does not do the same again")
            self.both(one, other)
        self.question = self.copies[True][ones[asked]]
        rest, those = ones[asked + 1 :], others[asked + 1 :]
        matcher = SequenceMatcher(None, list(map(_key, rest)), list(map(_key, those)), autojunk=False)
        for tag, start, stop, begin, end in matcher.get_opcodes():
            if tag == "equal":
                for one, other in zip(rest[start:stop], those[begin:end], strict=True):
                    self.both(one, other)
                continue
            for node in rest[start:stop]:
                self.alone(node, True)
            for node in those[begin:end]:
                self.alone(node, False)

    def both(self, one: fx.Node, other: fx.Node) -> None:
        """What both graphs call."""
        args = self.agreed(one.args, other.args)
        kwargs = self.agreed(one.kwargs, other.kwargs)
        copy = self.add(one, one.target, args, kwargs)
        self.copies[True][one] = self.copies[False][other] = copy

    def alone(self, node: fx.Node, answer: bool) -> None:
        """What one graph calls, and the other does not."""
        args, kwargs = self.copied((node.args, dict(node.kwargs)), answer)
        target: Any = node.target
        if node.op in ("call_function", "call_method"):
            _expect_harmless(node)
            args, target = (self.question, answer, *args), conditional(target)
        elif node.op != "get_attr":
            raise UntraceableError("its forward branches on a traced value, and calls other modules in one branch")
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


def _same_constant(one: Any, other: Any) -> bool:
    """Whether two constants of one type are the same; 0.0 and -0.0 are not, though they are equal."""
    return bool(one == other) and repr(one) == repr(other)


def _key(node: fx.Node) -> Any:
    """What nodes must have in common to be one: what they call, and how many arguments of what names they pass."""
    return node.op, node.target, len(node.args), tuple(node.kwargs)


def _expect_harmless(node: fx.Node) -> None:
    """Check that a call may stand in one branch alone."""
    if call_activation(node) or node.target is F.scaled_dot_product_attention:
        raise UntraceableError("its forward branches on a traced value, and calls other activations in one branch")
    if names_a_write(node) or "out" in node.kwargs:
        raise UntraceableError("its forward branches on a traced value, and writes in place in one branch")
