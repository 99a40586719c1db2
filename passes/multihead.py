"""The value path of torch.nn.MultiheadAttention: W_V, the mixing and W_O lie in one module, whose forward has no graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .channels import Channels
from .complex_values import has_complex_weights
from .link import Linked
from .outcome import Match, Reason
from .plan import Affine, Constraint, Site
from .strict import bias_is_free, weights_are_replaced
from .units import Spot

CALL = "attention"  # what a site's name and its δ call it
_SUMS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ARGUMENTS = {"query": 0, "value": 2}


def is_multihead(module: nn.Module) -> bool:
    """Whether the module is torch's MultiheadAttention, with torch's forward."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    return type(module).forward is nn.MultiheadAttention.forward and "forward" not in module.__dict__


def is_multihead_site(linked: Linked, site: Site) -> bool:
    """Whether the site is the value path inside such a module."""
    module = linked.modules.get(site.owner)
    return site.call == CALL and module is not None and is_multihead(module)


def value_path_inside(linked: Linked, path: str, planned: bool = False) -> Match | Reason:
    """A D W_V = 0 with W_V the last third of the fused projection, or the projection of the values alone.

    `planned` is as for `bias_is_free`.
    """
    module = linked.modules[path]
    assert isinstance(module, nn.MultiheadAttention)
    if module.bias_v is not None or module.add_zero_attn:
        return Reason("it has more values than queries (bias_v or add_zero_attn)")
    if has_complex_weights(module) or has_complex_weights(module.out_proj):
        return Reason("its weights are complex, and D is real")
    if not linked.callers.get(path):
        return Reason("its calls are not seen, nor whether it has as many queries as values")
    if not all(_self_attention(linked, caller) for caller in linked.callers[path]):
        return Reason("its queries and its values come from different places, and may differ in number")
    if (replaced := weights_are_replaced(linked, path)) is not None:
        return replaced
    prefix, width, out = f"{path}.".lstrip("."), module.embed_dim, linked.path_of(module.out_proj)
    first = Affine(
        path, "linear", prefix + ("in_proj_weight" if module._qkv_same_embed_dim else "v_proj_weight"),
        prefix + "in_proj_bias" if _has_bias(module, "in_proj_bias") else None, part=((2 * width, 3 * width),),
    )  # fmt: skip
    second = Affine(out, "linear", f"{out}.weight", f"{out}.bias" if _has_bias(module.out_proj, "bias") else None)
    carried = (
        bias_is_free(linked, second, planned) and not linked.callers.get(out) and not linked.uses_by_name(second.bias)
    )
    constraint: Constraint = "folded" if carried or first.bias is None else "augmented"
    view = (module.num_heads, 1, module.head_dim) if module.num_heads > 1 else ()
    return Match("strict", constraint, Channels(width, -1), first, second, "always", view)


def _has_bias(module: nn.Module, name: str) -> bool:
    """Whether the module has this bias; it is not asked for it, since a parametrisation may change with each reading."""
    return module._parameters.get(name) is not None or is_parametrized(module, name)


def _self_attention(linked: Linked, caller: Spot) -> bool:
    """Whether the queries are the values, or the values with something of their shape added (a position embedding)."""
    query, value = (_argument(caller.node, name) for name in _ARGUMENTS)
    if query is None or value is None:
        return False
    values, todo = linked.source(Spot(caller.unit, value)), [Spot(caller.unit, query)]
    for _ in range(8):
        if not todo:
            break
        here = linked.source(todo.pop())
        if here == values:
            return True
        if here.node.target in _SUMS:
            todo += [Spot(here.unit, operand) for operand in here.node.all_input_nodes]
    return False


def _argument(node: fx.Node, name: str) -> fx.Node | None:
    position = _ARGUMENTS[name]
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return value if isinstance(value, fx.Node) else None
