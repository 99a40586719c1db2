"""The weights of a site's W and A as matrices, and its b_W: A D W and the fold are computed from these.

A convolution is the same algebra per kernel tap: W becomes (n, inputs · taps), A becomes (outputs · taps, n), each per
group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from .plan import Affine
from .trace import module_at


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or parametrised tensor of a qualified name.

    Raises:
        AttributeError: the model has no such tensor.
    """
    path, _, attribute = name.rpartition(".")
    module = module_at(model, path)
    own = module._parameters.get(attribute)
    if own is not None and _reads_as_held(type(module), attribute):
        return whole(own)  # past the look-ups of getattr, which costs more than small sites' products
    if is_parametrized(module, attribute):
        with _at_rest(module, attribute):
            tensor = getattr(module, attribute)
    else:
        tensor = getattr(module, attribute)
    if not isinstance(tensor, Tensor):
        raise AttributeError(f"{name} is no tensor")
    return whole(tensor)


def _reads_as_held(cls: type[nn.Module], attribute: str) -> bool:
    """Whether who reads a parameter gets it as the module holds it: a class may have a way of its own, or a property."""
    plain = cls.__getattr__ is nn.Module.__getattr__ and cls.__getattribute__ is object.__getattribute__
    return plain and not hasattr(cls, attribute)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, differentiably; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(own: Tensor, value: Tensor) -> Tensor:
    """A tensor that every process holds whole, in the placement, dtype and device of `own`."""
    value = value.to(own.device, own.dtype)
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = own.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=own.placements)  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked by its look, as torch.distributed's tensors take 0.3 s to import."""
    return hasattr(tensor, "full_tensor")


@contextmanager
def _at_rest(module: nn.Module, attribute: str) -> Iterator[None]:
    """Keep a reading of a parametrised tensor from being a training step of it: spectral_norm's moves its vectors."""
    assert isinstance(module.parametrizations, nn.ModuleDict)
    awake = [each for each in module.parametrizations[attribute].modules() if each.training]
    for each in awake:
        each.training = False
    try:
        yield
    finally:
        for each in awake:
            each.training = True


def rows(model: nn.Module, affine: Affine) -> Tensor:
    """W by the channels it makes, its BatchNorm in eval mode included. Shape (groups, n / groups, inputs · taps).

    Where only a part of its outputs is meant, these rows are one group.
    """
    weight, groups = tensor_named(model, affine.weight), affine.groups
    if affine.op == "conv_transpose":  # stored (in, out / groups, *kernel)
        inputs, outputs = weight.shape[0], weight.shape[1]
        by_row = weight.reshape(groups, inputs // groups, outputs, -1).transpose(1, 2).reshape(groups, outputs, -1)
    else:
        outer = weight.t() if affine.stored == "in_out" else weight
        plain = groups == 1 and outer.dim() == 2
        by_row = outer.unsqueeze(0) if plain else outer.reshape(groups, outer.shape[0] // groups, -1)
    if affine.norm:
        by_row = by_row * _norm_scale(model, affine.norm).view(groups, -1, 1)
    return _part(by_row[0], affine).unsqueeze(0) if affine.part else by_row


def columns(model: nn.Module, affine: Affine, width: int) -> Tensor:
    """A by the channels it reads. Shape (groups, outputs · taps / groups, width / groups), taps running fastest.

    A Linear that reads flattened positions has one tap for each position of a channel.
    """
    weight, groups, inner = tensor_named(model, affine.weight), affine.groups, width // affine.groups
    if affine.op == "conv_transpose":
        return weight.reshape(groups, inner, -1).transpose(1, 2)
    outer = weight.t() if affine.stored == "in_out" else weight
    if groups == 1 and outer.shape[1:] == (inner,):
        return outer.unsqueeze(0)
    by_tap = outer.reshape(groups, outer.shape[0] // groups, inner, -1)
    return by_tap.transpose(2, 3).reshape(groups, -1, inner)


def offset(model: nn.Module, affine: Affine) -> Tensor | None:
    """b_W, shape (n,), its BatchNorm in eval mode included: s (b - μ) + β; None where the map has no constant."""
    bias = tensor_named(model, affine.bias) if affine.bias else None
    if not affine.norm:
        return None if bias is None else _part(bias, affine)
    norm = _norm(model, affine.norm)
    assert norm.running_mean is not None
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    scaled = _norm_scale(model, affine.norm) * shift
    return _part(scaled if norm.bias is None else scaled + whole(norm.bias), affine)


def _part(outputs: Tensor, affine: Affine) -> Tensor:
    """The outputs that belong to the site, along axis 0; a tensor that ends before them holds nothing else already."""
    if not affine.part or max(stop for _, stop in affine.part) > len(outputs):
        return outputs
    ranges = [outputs[start:stop] for start, stop in affine.part]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges)


def respond(model: nn.Module, affine: Affine, constant: Tensor) -> Tensor:
    """Σ_u A_u c: what A makes of an input that is c everywhere. `constant` has shape (n,), the result (outputs,)."""
    a = columns(model, affine, len(constant)).to(constant.dtype)
    weight = tensor_named(model, affine.weight)
    outputs = weight.shape[1] if affine.stored == "in_out" else weight.shape[0] // affine.groups
    by_tap = a @ constant.view(affine.groups, -1, 1)
    return by_tap.reshape(affine.groups, outputs, -1).sum(2).flatten()


def _norm(model: nn.Module, path: str) -> _BatchNorm:
    norm = module_at(model, path)
    assert isinstance(norm, _BatchNorm), "a plan's norm is a BatchNorm"
    return norm


def _norm_scale(model: nn.Module, path: str) -> Tensor:
    norm = _norm(model, path)
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else scale * whole(norm.weight)
