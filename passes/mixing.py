"""Recognising attention: calls that mix their values by weights which a softmax made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import MIXES
from .link import Linked
from .units import Spot

_PRODUCTS = MIXES.keys() - {F.scaled_dot_product_attention}
_SOFTMAXES: set[Any] = {F.softmax, torch.softmax, "softmax"}
FAR = 16  # how many calls may stand between a softmax and the product: dropout, casts, masks, maps across heads


def is_attention(linked: Linked, spot: Spot) -> bool:
    """Whether the call mixes values by weights: scaled_dot_product_attention, or a softmax's result times values."""
    if spot.node.target is F.scaled_dot_product_attention:
        return True
    if not is_product(spot.node):
        return False
    for here in linked.trail(Spot(spot.unit, weights_of(spot.node)), FAR):
        if here.node.target in _SOFTMAXES or isinstance(linked.module(here), nn.Softmax):
            return True
        if here.node.target in _PRODUCTS:
            return False
    return False


def weights_of(product: fx.Node) -> fx.Node:
    """The weights P of a product P V."""
    weights = product.args[_first(product)]
    assert isinstance(weights, fx.Node), "a product of two values"
    return weights


def is_product(node: fx.Node) -> bool:
    """Whether the call multiplies two values as matrices."""
    if node.target not in _PRODUCTS:
        return False
    operands = node.args[_first(node) :]
    return len(operands) == 2 and all(isinstance(value, fx.Node) for value in operands)


def _first(product: fx.Node) -> int:
    """Where the operands begin: einsum's equation stands before them."""
    return 1 if product.target is torch.einsum else 0
