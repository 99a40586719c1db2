"""Where a value may hold infinities: 0 · ∞ is no number, so a D-activation there would change the model's function.

An infinity comes from a constant in the code or in a buffer, and goes on through element-wise steps and wires; an affine
map, a norm or a softmax either ends it or makes the model's own output no number. What the user passes in, and what a
division or a logarithm makes of a zero, can't be seen.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from .activations import call_activation
from .calls import leaves
from .link import Linked
from .matrices import tensor_named
from .units import Spot
from .wires import Layout, through

_NAMES = (
    "add sub mul div where masked_fill masked_scatter clamp minimum maximum cat concat stack full full_like tensor "
    "zeros_like triu tril expand expand_as repeat view reshape flatten unsqueeze squeeze transpose permute contiguous "
    "clone to float double half type_as detach roll neg abs chunk split unbind select narrow"
)
_STEPS = _NAMES.split()
_PASSES_ON = {
    *(getattr(torch, name) for name in _STEPS if hasattr(torch, name)),
    *_STEPS,
    *(f"{name}_" for name in _STEPS),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem, operator.setitem),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
}
_LARGEST = 2**22  # elements of a buffer that are looked at


def may_be_infinite(linked: Linked, spot: Spot) -> bool:
    """Whether an infinity from a constant or a buffer can reach the value."""
    todo, seen = [spot], {spot}
    while todo:
        here = linked.source(todo.pop())
        node = here.node
        if node.op == "get_attr" and _holds_infinity(linked, here):
            return True
        wire = through(Layout(-3), node, linked.module(here)) or node.target in _PASSES_ON or call_activation(node)
        if not wire:
            continue
        bounded = node.target in _BOUNDS  # an infinite bound binds nothing
        given = leaves((node.args, dict(node.kwargs)))
        if not bounded and any(isinstance(leaf, float) and math.isinf(leaf) for leaf in given):
            return True
        inputs = node.all_input_nodes[:1] if bounded else node.all_input_nodes
        written = [user for value in inputs for user in value.users if user.target in _WRITES]
        new = {Spot(here.unit, value) for value in (*inputs, *written)} - seen
        seen |= new
        todo += new
    return False


_BOUNDS: set[Any] = {torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"}
_WRITES: set[Any] = {operator.setitem, "masked_fill_", "fill_", "masked_scatter_"}


def _holds_infinity(linked: Linked, spot: Spot) -> bool:
    name = f"{spot.unit.path}.{spot.node.target}".lstrip(".")
    try:
        tensor = tensor_named(linked.model, name)
    except AttributeError:
        return False
    looked_at = tensor.is_floating_point() and not tensor.is_meta and tensor.numel() <= _LARGEST
    return looked_at and bool(torch.isinf(tensor).any())
