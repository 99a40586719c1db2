"""Where a value is complex: D is real, and no activation of complex values is bypassed.

Complex weights elsewhere do no harm: those of a spectral convolution between real activations stay as they are. Their map
is no W and no A.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .activations import call_activation
from .calls import leaves
from .choices import step_of, value_inputs
from .held import names_in
from .infinities import PASSES_ON
from .link import Linked
from .units import ExampleInputs, Spot
from .wires import Layout, through

_FOURIER = ("fft", "ifft", "rfft", "fft2", "ifft2", "rfft2", "fftn", "ifftn", "rfftn")
_DTYPES = ("cfloat", "cdouble", "chalf", "complex32", "complex64", "complex128")
_NAMES = {*_FOURIER, *_DTYPES, "stft", "complex", "polar", "view_as_complex"}
_MAKES = {torch.complex, torch.polar, torch.view_as_complex, *(getattr(torch.fft, name) for name in _FOURIER)}
_STEPS = (
    *("matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "tensordot", "conv1d", "conv2d", "conv3d"),
    *("exp", "pow", "conj", "sqrt", "square"),
)
_PASSES_ON: set[Any] = {*PASSES_ON, *_STEPS, *(getattr(torch, name) for name in _STEPS)}
_PASSES_ON |= {F.linear, F.layer_norm, operator.matmul, operator.pow}
_PASSES_ON -= {torch.abs, "abs", "abs_", "float", "double", "half", "bfloat16", "type", "type_as"}  # real, or not known


def has_complex_weights(module: nn.Module) -> bool:
    """Whether a module without children, but for parametrisations, has complex parameters."""
    own = module.parameters() if module._modules else module._parameters.values()
    return any(parameter is not None and parameter.is_complex() for parameter in own)


def may_hold_complex(linked: Linked, inputs: ExampleInputs | None) -> bool:
    """Whether any value of a model may be complex: its tensors, the example inputs, and the names in its code tell."""
    given = tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    modules = linked.modules.values()
    own = ((*module._parameters.values(), *module._buffers.values()) for module in modules)
    tensors = itertools.chain(given, *own)
    if any(isinstance(each, Tensor) and each.is_complex() for each in tensors):
        return True
    return any(not _NAMES.isdisjoint(names_in(function)) for function in linked.tracing.functions())


def is_complex(linked: Linked, spot: Spot) -> bool:
    """Whether a value comes from complex weights, or from a step that makes complex values; what is not seen is real."""
    todo, seen = [spot], {spot}
    while todo:
        here = linked.source(todo.pop())
        if _becomes_complex(linked, here):
            return True
        node, module = here.node, linked.module(here)
        casts = any(isinstance(given, torch.dtype) for given in leaves((node.args, dict(node.kwargs))))
        wire = through(Layout(-3), node, module) or (module is not None and _is_leaf(module) and not module._parameters)
        known = wire or step_of(node).target in _PASSES_ON or call_activation(node)
        new = {Spot(here.unit, value) for value in (value_inputs(node) if known and not casts else ())} - seen
        seen |= new
        todo += new
    return False


def _becomes_complex(linked: Linked, spot: Spot) -> bool:
    node, module = spot.node, linked.module(spot)
    if module is not None:  # one with a graph is looked into: its result may be real
        return _is_leaf(module) and has_complex_weights(module)
    if node.op == "get_attr":
        tensor = linked.stored(spot)
        return tensor is not None and tensor.is_complex()
    dtypes = (given for given in leaves((node.args, dict(node.kwargs))) if isinstance(given, torch.dtype))
    return step_of(node).target in _MAKES or any(dtype.is_complex for dtype in dtypes)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module runs a forward of torch's and has no children: none of these makes complex values real."""
    torchs = str(getattr(type(module).forward, "__module__", "")).startswith("torch.nn.modules")
    return torchs and module._modules.keys() <= {"parametrizations"}
