"""What may stand between W and σ, and between σ and A: maps that are linear and treat every channel alike.

One row per operation: it says where the channel axis goes, how many positions a channel spans afterwards, and whether a
constant channel stays constant (padding cuts it at the border).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import acts_as
from .choices import Step, step_of
from .outcome import Reason
from .set_attributes import returning
from .trace import OwnerGraph


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels of a value lie and what the wires passed so far did to it.

    `axis` counts from the end; `rank` is the number of axes where it is known. `flat` says that each channel spans a
    run of neighbouring positions. `noisy` says that a dropout is active in training mode, `cut` that a constant does
    not stay constant.
    """

    axis: int
    rank: int | None = None
    flat: bool = False
    noisy: bool = False
    cut: bool = False


_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}
_SWITCHED = {*_DROPOUTS, F.batch_norm, F.scaled_dot_product_attention}


def modes_agree(owned: OwnerGraph) -> bool:
    """Whether eval mode runs the same graph as training mode, but for dropouts, the flags of dropout and normalisation, and
    what is kept to be looked at.
    """
    if owned.in_eval is None:
        return not any(map(always_drops, owned.graph.nodes))
    in_training, in_eval = returning(owned.graph), returning(owned.in_eval.graph)
    names = {node.name for node in in_eval}
    dropped = {node: node.args[0] for node in in_training if _drops_one(node) and node.name not in names}
    in_training = [node for node in in_training if node not in dropped]
    pairs = list(zip(in_training, in_eval, strict=False))

    def given(node: fx.Node) -> str:
        return str(fx.map_arg((node.args, node.kwargs), lambda value: _before(value, dropped)))

    if len(in_training) != len(in_eval) or any(map(always_drops, in_eval)):
        return False
    return all(
        (one.op, one.target, one.name) == (two.op, two.target, two.name)
        and (one.target in _SWITCHED or given(one) == str((two.args, two.kwargs)))
        for one, two in pairs
    )


def _drops_one(node: fx.Node) -> bool:
    """Whether the node is a dropout of a value, as in `if self.training: x = F.dropout(x, self.p)`, and writes nowhere."""
    drops = node.op == "call_function" and node.target in _DROPOUTS and node.all_input_nodes == [*node.args[:1]]
    return drops and not _argument(node, 3, "inplace", False)


def _before(value: fx.Node, dropped: Mapping[fx.Node, Any]) -> fx.Node:
    """The value in front of the dropouts that made this one."""
    while value in dropped:
        value = dropped[value]
    return value


def how_modes_differ(owned: OwnerGraph, whose: str = "its forward") -> Reason:
    """Why the modes do not agree, which they do not."""
    if any(map(always_drops, owned.versions[1].nodes)):
        return Reason(f"a dropout in {whose} is on in eval mode too", "give F.dropout training=self.training")
    return Reason(f"{whose} differs between training and eval mode in more than dropout and normalisation")


def always_drops(node: fx.Node) -> bool:
    """Whether a dropout stays on in the eval graph."""
    drops = node.op == "call_function" and node.target in _DROPOUTS
    return drops and _argument(node, 2, "training", True) is not False and _argument(node, 1, "p", 0.5) != 0


Wire = Callable[[Layout, fx.Node, nn.Module | None], Layout | None]


def through(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    """The layout behind the node; None where the node is no wire."""
    wire = _wire(node, module)
    return wire(layout, node, module) if wire else None


def is_wire(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node is an operation that may be a wire."""
    return _wire(node, module) is not None


def still(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    """What a wire that leaves the axes alone adds to `noisy` and `cut`; None for all other nodes."""
    for axis in (-1, -2, -3, -4, -5, -9):  # a wire that keeps each of these keeps them all
        probe = Layout(axis)
        passed = through(probe, node, module)
        if passed is None or passed.axis != axis or passed.flat:
            return None
    return replace(layout, noisy=layout.noisy or passed.noisy, cut=layout.cut or passed.cut) if passed else None


def _wire(node: fx.Node, module: nn.Module | None) -> Wire | None:
    if node.op == "call_module" and module is not None:
        return _BY_FORWARD.get(type(module).forward) if acts_as(module, type(module)) else None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _same(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout:
    return layout


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _dropout(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    if module is not None:
        return replace(layout, noisy=layout.noisy or bool(module.p))
    p, training = _argument(node, 1, "p", 0.5), _argument(node, 2, "training", True)
    if not isinstance(p, float | int) or not isinstance(training, bool):
        return None
    return replace(layout, noisy=layout.noisy or (training and p > 0))


def _pool(dims: int) -> Wire:
    def pool(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
        if layout.axis >= -dims or layout.flat:
            return None
        padding = module.padding if module is not None else _argument(node, 3, "padding", 0)
        divides = (
            getattr(module, "divisor_override", None) if module is not None else _argument(node, 6, "divisor_override")
        )
        if divides is not None:
            return None  # the mean of a constant is another constant then
        counts = module.count_include_pad if module is not None else _argument(node, 5, "count_include_pad", True)
        pads = any(padding) if isinstance(padding, tuple | list) else bool(padding)
        return replace(layout, cut=layout.cut or (pads and bool(counts)))

    return pool


def _adaptive_pool(dims: int) -> Wire:
    def pool(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
        return None if layout.axis >= -dims or layout.flat else layout

    return pool


def _flatten(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    start = module.start_dim if module is not None else _argument(node, 1, "start_dim", 0)
    end = module.end_dim if module is not None else _argument(node, 2, "end_dim", -1)
    second = layout.rank is not None and layout.axis == 1 - layout.rank
    if end == -1 and second and start in (2, layout.axis + 1) and layout.axis < -1 and not layout.flat:
        return replace(layout, axis=-2, rank=3)  # the positions become one axis, behind the channels
    return _merged(layout) if end == -1 and (start == layout.axis or (start == 1 and second)) else None


def _merged(layout: Layout) -> Layout:
    """Channels in front and positions behind become one axis; a batch axis alone stands before them."""
    rank = None if layout.rank is None else layout.rank + layout.axis + 1
    return replace(layout, axis=-1, rank=rank, flat=layout.flat or layout.axis < -1)


def _view(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    """`x.view(x.size(0), -1)` and the like, a flatten from axis 1 on; `x.view(-1, x.size(-1))`, which keeps the last axis."""
    shape = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "shape")
    if not isinstance(shape, tuple | list):
        return None
    if layout.axis == -1 and not layout.flat and shape and _is_last_size(shape[-1], node.args[0]):
        return replace(layout, rank=len(shape))
    if len(shape) != 2 or shape[1] != -1:
        return None
    second = layout.rank is not None and layout.axis == 1 - layout.rank
    return _merged(layout) if second and _is_size_of(shape[0], node.args[0], 0) else None


def _is_last_size(size: Any, value: Any) -> bool:
    """Whether it is the length of the value's last axis, or of what the value is a contiguous copy of."""
    while isinstance(value, fx.Node):
        if _is_size_of(size, value, -1):
            return True
        copies = value.op == "call_method" and value.target in ("contiguous", "clone")
        value = value.args[0] if copies else None
    return False


def _is_size_of(size: Any, value: Any, axis: int) -> bool:
    if not isinstance(size, fx.Node):
        return False
    if size.target is len:
        return axis == 0 and size.args == (value,)
    if size.op == "call_method" and size.target == "size":
        return size.args == (value, axis)
    if size.target is not getattr and size.op == "call_function" and len(size.args) == 2 and size.args[1] == axis:
        shape = size.args[0]  # x.shape[0] or x.size()[0]
        if isinstance(shape, fx.Node):
            return shape.args == (value, "shape") or (shape.target == "size" and shape.args == (value,))
    return False


def _permute(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    dims = node.args[1] if len(node.args) == 2 else node.args[1:]
    if layout.flat or not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims):
        return None
    rank = len(dims)
    places = [d % rank for d in dims]
    if layout.axis < -rank or layout.rank not in (None, rank):
        return None
    return replace(layout, axis=places.index(layout.axis % rank) - rank, rank=rank)


def _transpose(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    first, second = _argument(node, 1, "dim0"), _argument(node, 2, "dim1")
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    if layout.rank is not None:
        first, second = (axis - layout.rank if axis >= 0 else axis for axis in (first, second))
    if first >= 0 or second >= 0:
        return None  # counted from the front, the axes depend on the rank
    swapped = {first: second, second: first}
    return replace(layout, axis=swapped.get(layout.axis, layout.axis))


def _mean(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    dims = _argument(node, 1, "dim")
    keepdim = bool(_argument(node, 2, "keepdim", False))
    dims = (dims,) if isinstance(dims, int) else dims
    if layout.flat or not isinstance(dims, tuple | list) or layout.rank is None:
        return None
    rank, channel = layout.rank, layout.axis % layout.rank
    gone = {d % rank for d in dims if isinstance(d, int)}
    if channel in gone or 0 in gone or len(gone) != len(dims):
        return None
    if keepdim:
        return layout
    left = [axis for axis in range(rank) if axis not in gone]
    return replace(layout, axis=left.index(channel) - len(left), rank=len(left))


def _cast(layout: Layout, node: fx.Node, module: nn.Module | None) -> Layout | None:
    """To another dtype or device: the same values, up to rounding."""
    return layout if is_cast(step_of(node)) else None


def is_cast(step: Step) -> bool:
    """Whether a call takes a value to another dtype or device, and leaves it as it is, up to rounding."""
    given = (*step.args, *step.kwargs.values())
    whole = any(isinstance(value, torch.dtype) and not value.is_floating_point for value in given)
    return step.op == "call_method" and step.target in _CASTS and not whole


_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16"}


_MODULES: dict[type[nn.Module], Wire] = {
    nn.Identity: _same,
    nn.Dropout: _dropout, nn.Dropout1d: _dropout, nn.Dropout2d: _dropout, nn.Dropout3d: _dropout,
    nn.AvgPool1d: _pool(1), nn.AvgPool2d: _pool(2), nn.AvgPool3d: _pool(3),
    nn.AdaptiveAvgPool1d: _adaptive_pool(1), nn.AdaptiveAvgPool2d: _adaptive_pool(2),
    nn.AdaptiveAvgPool3d: _adaptive_pool(3),
    nn.Flatten: _flatten,
    nn.Sequential: _same,  # an empty one: linking steps into the others
}  # fmt: skip

_BY_FORWARD: dict[Callable[..., Any], Wire] = {cls.forward: wire for cls, wire in _MODULES.items()}

_FUNCTIONS: dict[Any, Wire] = {
    F.dropout: _dropout, F.dropout1d: _dropout, F.dropout2d: _dropout, F.dropout3d: _dropout,
    F.avg_pool1d: _pool(1), F.avg_pool2d: _pool(2), F.avg_pool3d: _pool(3),
    F.adaptive_avg_pool1d: _adaptive_pool(1), F.adaptive_avg_pool2d: _adaptive_pool(2),
    F.adaptive_avg_pool3d: _adaptive_pool(3),
    torch.flatten: _flatten, torch.permute: _permute, torch.transpose: _transpose, torch.mean: _mean,
    torch.reshape: _view, torch.clone: _same,
}  # fmt: skip

_METHODS: dict[str, Wire] = {
    "flatten": _flatten, "permute": _permute, "transpose": _transpose, "mean": _mean, "view": _view, "reshape": _view,
    "contiguous": _same, "clone": _same,
    **dict.fromkeys(_CASTS, _cast),
}  # fmt: skip
