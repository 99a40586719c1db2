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
import torch.nn.functional as F

from .activations import call_activation
from .calls import leaves
from .choices import pick, step_of, value_inputs
from .link import Linked
from .units import Spot
from .wires import Layout, through
from .writes import writers

_NAMES = (
    "add sub mul div where masked_fill masked_scatter clamp minimum maximum cat concat stack full full_like tensor "
    "new_full new_tensor as_tensor zeros_like triu tril expand expand_as broadcast_to repeat tile view reshape flatten "
    "unflatten unsqueeze squeeze transpose permute movedim swapaxes contiguous clone to type float double half bfloat16 "
    "type_as detach roll flip neg abs chunk split unbind select narrow fill copy fill_diagonal scatter scatter_add "
    "scatter_reduce index_fill index_put index_copy index_add index_select masked_select gather take take_along_dim topk "
    "sort max min amax amin sum mean cumsum"
)
_STEPS = _NAMES.split()
PASSES_ON = {
    *(getattr(torch, name) for name in _STEPS if hasattr(torch, name)),
    *_STEPS,
    *(f"{name}_" for name in _STEPS),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem, operator.setitem),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, F.pad, pick),
}
_LARGEST = 2**22  # elements of a buffer that are looked at


def may_be_infinite(linked: Linked, spot: Spot) -> bool:
    """Whether an infinity from a constant or a buffer can reach the value."""
    todo, seen, written = [spot], {spot}, set[Spot]()
    while todo:
        here = linked.source(todo.pop())
        node = here.node
        if node.op == "get_attr" and _holds_infinity(linked, here):
            return True
        new = {*writers(linked, here)}  # into the value, whatever made it
        written |= new
        target = step_of(node).target
        wire = target in PASSES_ON or here in written or call_activation(node) is not None
        wire = wire or through(Layout(-3), node, linked.module(here)) is not None
        bounded = target in _BOUNDS  # an infinite bound binds nothing
        given = leaves((node.args, dict(node.kwargs)))
        if wire and not bounded and any(isinstance(leaf, float) and math.isinf(leaf) for leaf in given):
            return True
        inputs = value_inputs(node)[: 1 if bounded else None] if wire else []
        new = (new | {Spot(here.unit, value) for value in inputs}) - seen
        seen |= new
        todo += new
    return False


_BOUNDS: set[Any] = {torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"}


def _holds_infinity(linked: Linked, spot: Spot) -> bool:
    tensor = linked.stored(spot)
    if tensor is None or not tensor.is_floating_point() or tensor.is_meta or tensor.numel() > _LARGEST:
        return False
    return bool(torch.isinf(tensor).any())
