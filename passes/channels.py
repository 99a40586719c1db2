"""The channel axis and the width of a value, from the modules and parameters it comes from or goes to (provenance)."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .affine import affine_at
from .choices import pick, value_inputs
from .link import Linked
from .units import Spot
from .wires import Layout, through

DEPTH = 150  # how many values deep provenance looks before it gives up


class Channels(NamedTuple):
    """How many channels a value has, and along which axis (a BatchNorm's is 1, all others count from the end)."""

    width: int
    axis: int


_KEEPS_SHAPE_FUNCTIONS = {
    F.dropout, torch.clone, F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm, F.interpolate,
    F.normalize, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.softmax, torch.softmax, torch.clamp,
    torch.sqrt, torch.abs, torch.neg, torch.sin, torch.cos, torch.clamp_min,
}  # fmt: skip
_KEEPS_SHAPE_METHODS = {
    "contiguous", "clone", "to", "float", "half", "type_as", "clamp", "softmax", "clamp_", "sqrt", "abs", "neg",
    "detach", "masked_fill", "masked_fill_", "type", "sin", "cos", "clamp_min",
}  # fmt: skip
_BINARY = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.iadd, operator.isub,
    operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div, torch.addcmul, torch.maximum,
    torch.minimum,
}  # fmt: skip
_BINARY_METHODS = {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "addcmul", "addcmul_"}
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d,
)  # fmt: skip
_SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Softmax)


def channels_for(linked: Linked, spot: Spot) -> Channels | None:
    """The channels that the readers of the value expect; None where they do not settle it, or disagree."""
    found: set[Channels] = set()
    todo, budget = [spot], DEPTH
    while todo and budget:
        here = todo.pop()
        budget -= 1
        for use in linked.uses(here):
            if use is None:
                continue
            reader = affine_at(linked, use)
            if reader is not None and reader.value is not None:
                found.add(Channels(reader.inputs, reader.axis))
            elif _keeps_shape(linked, use):
                norm = _normalised(linked.module(use))
                found |= {norm} if norm else set()
                todo.append(use)
    return found.pop() if len(found) == 1 else None


class Provenance:
    """The channels of a model's values, from where they come; what is found once is remembered."""

    def __init__(self, linked: Linked) -> None:
        self.linked = linked
        self.known: dict[Spot, Channels | None] = {}
        self.asked: dict[Spot, int] = {}  # values on the way back that is being walked, numbered: a loop ends here
        self.doubtful: dict[Spot, int] = {}  # not settled, as far as is known while the value of that number is walked
        self.reached = DEPTH  # the lowest number on which hangs what is being settled; below 0, it was too deep

    def value(self, spot: Spot | None) -> Channels | None:
        """The channels of the value at a spot; None where they are not settled by where it comes from."""
        if spot is None:
            return None
        spot = spot if _declared(self.linked.module(spot)) else self.linked.source(spot)
        if spot in self.known:
            return self.known[spot]
        number = len(self.asked)
        if spot in self.asked or spot in self.doubtful or number == DEPTH:
            self.reached = min(self.reached, self.asked.get(spot, self.doubtful.get(spot, -1)))
            return None
        outside, self.reached = self.reached, DEPTH
        self.asked[spot] = number
        found = self.settle(spot)
        del self.asked[spot]
        if found is not None or self.reached >= number:
            self.known[spot] = found
            self.doubtful = {each: on for each, on in self.doubtful.items() if on < number}
        else:  # it hangs on one that is still being walked, and so does what hung on it
            self.doubtful = {each: min(on, self.reached) if on >= number else on for each, on in self.doubtful.items()}
            self.doubtful[spot] = self.reached
        self.reached = min(outside, self.reached) if self.reached < number else outside
        if not number:
            self.doubtful, self.reached = {}, DEPTH
        return found

    def settle(self, spot: Spot) -> Channels | None:
        """The channels by what the spot does: an affine map, a norm, or something that passes them on."""
        module = self.linked.module(spot)
        if module is None:
            made = affine_at(self.linked, spot)
            return Channels(made.outputs, made.axis) if made is not None else self.call(spot)
        known = _declared(module) or _normalised(module)
        if known is not None:
            return known
        if not _keeps_shape(self.linked, spot):
            return self.moved(spot, module)
        before = self.first(spot)
        if before is None and isinstance(module, _InstanceNorm):
            return Channels(module.num_features, 1)  # most likely: nothing else tells
        if before is not None and isinstance(module, _POOLS) and -_pooled_axes(module) <= before.axis < 0:
            return None  # it pools over the channels themselves
        return before

    def first(self, spot: Spot) -> Channels | None:
        inputs = spot.node.all_input_nodes
        return self.value(Spot(spot.unit, inputs[0])) if inputs else None

    def call(self, spot: Spot) -> Channels | None:
        node = spot.node
        if node.op == "placeholder":
            return self.callers(spot)
        if node.target in _BINARY or (node.op == "call_method" and node.target in _BINARY_METHODS):
            return self.binary(spot)
        if node.target is torch.cat or node.target is torch.concat:
            return self.concatenated(spot)
        if node.target is operator.getitem:
            return self.chunk(spot)
        if node.target is pick:
            found = {self.value(Spot(spot.unit, option)) for option in value_inputs(node)}
            return found.pop() if len(found) == 1 else None
        if _keeps_shape(self.linked, spot):
            return self.first(spot)
        return self.moved(spot, None)

    def callers(self, spot: Spot) -> Channels | None:
        """All callers of a module pass the same number of channels, or it is not known."""
        unit = spot.unit
        if unit.path in self.linked.unseen or not unit.path:
            return None
        found = {self.value(argument) for argument in self.linked.arguments(spot)}
        return found.pop() if len(found) == 1 else None

    def binary(self, spot: Spot) -> Channels | None:
        """Element-wise with broadcasting: the first operand that has more than one channel tells, the latest first.

        The operand computed last is the nearer one: of a residual sum it is the branch, not the trunk.
        """
        values = [value for value in spot.node.all_input_nodes if value.op != "get_attr"]
        for value in reversed(values):
            found = self.value(Spot(spot.unit, value))
            if found is not None and found.width > 1:
                return found
        return None

    def concatenated(self, spot: Spot) -> Channels | None:
        parts = spot.node.args[0] if spot.node.args else None
        dim = (
            spot.node.args[1]
            if len(spot.node.args) > 1
            else spot.node.kwargs.get("dim", spot.node.kwargs.get("axis", 0))
        )
        if not isinstance(parts, list | tuple) or not isinstance(dim, int):
            return None
        found = [self.value(Spot(spot.unit, part)) for part in parts if isinstance(part, fx.Node)]
        if len(found) != len(parts) or any(known is None for known in found):
            return None
        axes = {known.axis for known in found if known}
        if len(axes) != 1:
            return None
        axis = axes.pop()
        if dim == axis or (dim == 1 and axis < -1):
            return Channels(sum(known.width for known in found if known), axis)
        widths = {known.width for known in found if known}
        return Channels(widths.pop(), axis) if len(widths) == 1 and dim != 1 else None

    def chunk(self, spot: Spot) -> Channels | None:
        """One part of `chunk(n, dim)` or `split(size, dim)`."""
        parts, index = spot.node.args
        if not isinstance(parts, fx.Node) or parts.target not in ("chunk", "split", torch.chunk, torch.split):
            return None
        whole = self.value(Spot(spot.unit, parts.args[0])) if isinstance(parts.args[0], fx.Node) else None
        dim = parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0)
        size: Any = parts.args[1] if len(parts.args) > 1 else next(iter(parts.kwargs.values()), None)
        if whole is None or not (dim == whole.axis or (dim == 1 and whole.axis < -1)):
            return whole if whole is not None and dim == 0 else None
        if parts.target in ("chunk", torch.chunk):
            return (
                whole._replace(width=whole.width // size) if isinstance(size, int) and whole.width % size == 0 else None
            )
        if isinstance(size, int):
            return whole._replace(width=size) if whole.width % size == 0 else None
        width = size[index] if isinstance(size, list | tuple) and isinstance(index, int) else None
        return whole._replace(width=width) if isinstance(width, int) else None

    def moved(self, spot: Spot, module: nn.Module | None) -> Channels | None:
        """Through a wire that moves the axes (permute, flatten of positions)."""
        before = self.first(spot)
        if before is None or before.axis >= 0:
            return None
        rank = 1 - before.axis if before.axis < -1 else None
        after = through(Layout(before.axis, rank), spot.node, module)
        return None if after is None or after.flat else Channels(before.width, after.axis)


def _pooled_axes(module: nn.Module) -> int:
    """Over how many of the last axes a pooling or padding module works, by its name: MaxPool2d over two."""
    digits = [int(letter) for letter in type(module).__name__ if letter.isdigit()]
    return digits[-1] if digits else 2


def _declared(module: nn.Module | None) -> Channels | None:
    """What a Linear or a convolution says of itself; a subclass with a forward of its own keeps the attributes' sense."""
    if isinstance(module, _ConvNd):
        return Channels(module.out_channels, -len(module.kernel_size) - 1)
    return Channels(module.out_features, -1) if isinstance(module, nn.Linear) else None


def _normalised(module: nn.Module | None) -> Channels | None:
    """The channels that a normalisation layer knows of."""
    if isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and not _asks_nothing(module)):
        return Channels(module.num_features, 1)
    if isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward:
        return Channels(module.num_channels, 1)
    if isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward:
        return Channels(module.normalized_shape[-1], -1)
    if isinstance(module, nn.RMSNorm) and type(module).forward is nn.RMSNorm.forward:
        return Channels(module.normalized_shape[-1], -1)
    if isinstance(module, nn.Embedding):
        return Channels(module.embedding_dim, -1)
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return Channels(module.num_parameters, 1)
    return None


def _asks_nothing(module: _InstanceNorm) -> bool:
    """Whether it takes any number of channels, whatever it was made for: without weights and running averages."""
    return not module.affine and not module.track_running_stats


def _keeps_shape(linked: Linked, spot: Spot) -> bool:
    """Whether the result has the channels of the first input, along the same axis."""
    node, module = spot.node, linked.module(spot)
    if isinstance(module, _ConvNd | nn.Linear):
        return False
    if isinstance(module, (*_SAME, *_POOLS, _InstanceNorm)) or linked.activation(spot) is not None:
        return True
    known: set[Any] = _KEEPS_SHAPE_METHODS if node.op == "call_method" else _KEEPS_SHAPE_FUNCTIONS
    return module is None and node.target in known
