"""Recognising affine maps in a graph: torch's own Linear and convolutions, and the functions under them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from .activations import acts_as
from .complex_values import has_complex_weights
from .link import Linked
from .matrices import tensor_named
from .plan import Affine
from .units import Spot

_CONVS: dict[type[_ConvNd], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: dict[type[_ConvNd], int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_CONV_FUNCTIONS: dict[Any, int] = {
    F.conv1d: 1, torch.conv1d: 1, F.conv2d: 2, torch.conv2d: 2, F.conv3d: 3, torch.conv3d: 3,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """An affine map met in a graph.

    Attributes:
        axis: the channel axis it reads and writes, counted from the end.
        inputs, outputs: how many channels it reads and writes.
        pads: whether a constant input does not give a constant output.
        value: the node that it reads.
        biases: where the bias is put together from parameters, each one's name by the range of outputs that it serves.
    """

    affine: Affine
    axis: int
    inputs: int
    outputs: int
    pads: bool
    value: fx.Node | None
    biases: Mapping[tuple[tuple[int, int], ...], str] = field(default_factory=dict)


def affine_at(linked: Linked, spot: Spot) -> Found | None:
    """The affine map that the spot applies; None where it applies none."""
    module = linked.module(spot)
    if module is not None:
        return _module(linked, spot, module)
    return _function(linked, spot) if spot.node.op == "call_function" else None


def norm_at(linked: Linked, spot: Spot) -> str | None:
    """The path of the BatchNorm with running statistics that the spot applies; None where it applies none."""
    module = linked.module(spot)
    path = None
    if isinstance(module, _BatchNorm) and acts_as(module, _BatchNorm):
        path = linked.child(*spot)
    elif spot.node.target is F.batch_norm and _normalises_by_its_own(linked, spot):
        path = spot.unit.path
    norm = linked.modules[path] if path is not None else None
    real = isinstance(norm, _BatchNorm) and norm.running_mean is not None and not has_complex_weights(norm)
    return path if real else None


def _normalises_by_its_own(linked: Linked, spot: Spot) -> bool:
    """Whether F.batch_norm, in eval mode, takes the statistics and parameters of the module that calls it."""
    owned = linked.graphs[spot.unit]
    version = owned.in_eval or owned
    twin = next((node for node in version.graph.nodes if node.name == spot.node.name), None)
    if twin is None or twin.target is not F.batch_norm:
        return False
    given = _named(twin, "input", "running_mean", "running_var", "weight", "bias", "training")
    own = ("running_mean", "running_var", "weight", "bias")
    same = all(isinstance(given.get(name), fx.Node) and given[name].target == name for name in own)
    return same and given.get("training", False) is False


def _module(linked: Linked, spot: Spot, module: nn.Module) -> Found | None:
    value = _node(spot.node.args[0] if spot.node.args else spot.node.kwargs.get("input"))
    if not ("weight" in module._parameters or is_parametrized(module, "weight")):
        return None  # `is_made_anew`, for example
    if has_complex_weights(module):
        return None  # D is real, and so are A D W and the fold
    path = linked.child(*spot)
    bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
    if isinstance(module, nn.Linear) and acts_as(module, nn.Linear):
        affine = Affine(path, "linear", f"{path}.weight", bias)
        return Found(affine, -1, module.in_features, module.out_features, False, value)
    stored = linked.look_alike(path)
    if stored is not None:
        shape = tensor_named(linked.model, f"{path}.weight").shape
        outputs, inputs = shape if stored == "out_in" else shape[::-1]
        return Found(Affine(path, "linear", f"{path}.weight", bias, stored=stored), -1, inputs, outputs, False, value)
    if not isinstance(module, _ConvNd):
        return None
    taps, groups = math.prod(module.kernel_size), module.groups
    for cls, dims in _CONVS.items():
        plain = isinstance(module, cls) and acts_as(module, cls) and type(module)._conv_forward is cls._conv_forward
        if plain or (isinstance(module, cls) and linked.convolves(path)):
            affine = Affine(path, "conv", f"{path}.weight", bias, groups=groups, taps=taps)
            pads = not plain or _pads(module.padding, module.kernel_size, module.padding_mode)
            return Found(affine, -dims - 1, module.in_channels, module.out_channels, pads, value)
    for cls, dims in _TRANSPOSED.items():
        if isinstance(module, cls) and acts_as(module, cls):
            affine = Affine(path, "conv_transpose", f"{path}.weight", bias, stored="in_out", groups=groups, taps=taps)
            return Found(affine, -dims - 1, module.in_channels, module.out_channels, True, value)
    return None


def is_made_anew(module: nn.Module) -> bool:
    """Whether a hook makes the weight anew in every forward, as the old forms of weight_norm and spectral_norm do."""
    return "weight" in module.__dict__ and bool(module._forward_pre_hooks)


def _pads(padding: Any, kernel: tuple[int, ...], mode: str = "zeros") -> bool:
    """Whether a border of zeros cuts a constant off; the other padding modes go on with it."""
    if mode != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(size > 1 for size in kernel)
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


def _function(linked: Linked, spot: Spot) -> Found | None:
    node = spot.node
    if node.target is torch.addmm:
        given = _named(node, "bias", "input", "weight")
        return (
            _applied(linked, spot, given, 0, stored_in_out=True)
            if given.keys() == {"bias", "input", "weight"}
            else None
        )
    if node.target is F.linear:
        return _applied(linked, spot, _named(node, "input", "weight", "bias"), 0)
    if node.target in _CONV_FUNCTIONS:
        given = _named(node, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
        return _applied(linked, spot, given, _CONV_FUNCTIONS[node.target])
    return None


def _named(node: fx.Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _applied(linked: Linked, spot: Spot, given: dict[str, Any], dims: int, stored_in_out: bool = False) -> Found | None:
    """A function applied to parameters of the model: x W^T + b for `dims` 0, a convolution over `dims` axes else."""
    weight, bias = _parameter(linked, spot, given.get("weight")), _parameter(linked, spot, given.get("bias"))
    biases = _joined(linked, spot, given.get("bias"))
    if weight is None or (bias is None and not biases and given.get("bias") is not None):
        return None
    matrix = tensor_named(linked.model, weight)
    if matrix.is_complex():
        return None
    shape = matrix.shape
    name, value = weight.rpartition(".")[0] or weight, _node(given.get("input"))
    if dims == 0:
        outputs, inputs = (shape[1], shape[0]) if stored_in_out else shape
        affine = Affine(name, "linear", weight, bias, stored="in_out" if stored_in_out else "out_in")
        return Found(affine, -1, inputs, outputs, False, value, biases)
    groups, padding = given.get("groups", 1), given.get("padding", 0)
    amounts = padding if isinstance(padding, tuple | list) else (padding,)
    if biases or not isinstance(groups, int) or not all(isinstance(amount, int | str) for amount in amounts):
        return None
    affine = Affine(name, "conv", weight, bias, groups=groups, taps=math.prod(shape[2:]))
    return Found(affine, -dims - 1, shape[1] * groups, shape[0], _pads(padding, tuple(shape[2:])), value)


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _parameter(linked: Linked, spot: Spot, value: Any) -> str | None:
    """The qualified name of the parameter that an argument is."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    return f"{spot.unit.path}.{value.target}".lstrip(".")


def _joined(linked: Linked, spot: Spot, value: Any) -> dict[tuple[tuple[int, int], ...], str]:
    """The parameters that a bias is put together from, by their ranges; zeros may stand between them."""
    if not isinstance(value, fx.Node) or value.target not in (torch.cat, torch.concat):
        return {}
    parts = value.args[0] if value.args else value.kwargs.get("tensors")  # a bias has one axis to join
    if not isinstance(parts, tuple | list) or len(parts) < 2:
        return {}
    found: dict[tuple[tuple[int, int], ...], str] = {}
    start = 0
    for part in parts:
        zeros = isinstance(part, fx.Node) and part.target is torch.zeros_like
        name = _parameter(linked, spot, part.args[0] if zeros and part.args else part)
        if name is None:
            return {}
        stop = start + len(tensor_named(linked.model, name))
        if not zeros:
            found[(start, stop),] = name
        start = stop
    return found
