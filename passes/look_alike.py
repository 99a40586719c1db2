"""Modules that act like a Linear or a convolution without having its forward: found by what they compute."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import product
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .activations import acts_as, module_activation
from .reads import OF_EVERY_MODULE
from .source import nested, reached, trap

Stored = Literal["out_in", "in_out"]

LARGEST = 2**24  # elements of a weight that are tried out


_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


def likeness(module: nn.Module) -> Hashable | None:
    """What modules of one class that behave alike have in common: flags and numbers, shapes, and that no hook is on them.

    None where the module holds other things too, a child or a function perhaps.
    """
    held = plain_attributes(module)
    others = module._modules or vars(module).keys() - OF_EVERY_MODULE - held.keys()
    if others or not acts_as(module, type(module)):
        return None
    tensors = {**module._parameters, **module._buffers}
    kinds = ((name, None if each is None else (tuple(each.shape), each.dtype)) for name, each in tensors.items())
    return str(held), tuple(kinds)


def stateless_forward(module: nn.Module, is_new: bool = False) -> Callable[..., Any] | None:
    """The forward of a module that is no more than a function: it holds nothing, or is an activation of torch's.

    One that is made anew in every call (`is_new`) may hold settings and children, and is in the mode that it is made in.
    """
    cls = type(module)
    own = vars(module).keys() - OF_EVERY_MODULE
    held = module._parameters or module._buffers or (module._modules and not is_new)
    if held or not acts_as(module, cls) or (own and not is_new and module_activation(module) is None):
        return None
    forward = inspect.unwrap(cls.forward)
    if not isinstance(forward, FunctionType):
        return None
    own_and_above = [vars(base)["forward"] for base in cls.__mro__ if base is not nn.Module and "forward" in vars(base)]
    forwards = [inspect.unwrap(each) for each in own_and_above]  # super().forward may run those above
    functions = [each for function in own_and_above for each in reached(function, cls)]
    asks = any(_names_the_mode(each) for each in (*forwards, *functions) if isinstance(each, FunctionType))
    return None if (asks and not is_new) or trap(forward, functions) else cls.forward


def _names_the_mode(function: FunctionType) -> bool:
    """Whether a function may ask for a module's mode, which nobody sees change in a module outside the model."""
    return any("training" in (*code.co_names, *code.co_consts) for code in nested(function.__code__))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The flags, numbers and names that a module holds."""
    return {name: value for name, value in vars(module).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple | list) else isinstance(value, _PLAIN)


def linear_look_alike(module: nn.Module) -> Stored | None:
    """How a module's weight is stored, where its forward is x ↦ x Wᵀ + b on the last axis; None for other modules.

    The forward is run on a copy with weights of its own, in both modes, on inputs of two and of three axes.
    """
    if not may_be_linear(module):
        return None
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    return next((stored for stored in _orders(weight, bias) if _computes(module, stored)), None)


def may_be_linear(module: nn.Module) -> bool:
    """Whether a module with a forward of its own holds what a Linear holds: to be asked before it is tried out."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or not _holds_no_more(module) or type(module).forward is nn.Linear.forward:
        return False
    if weight.dim() != 2 or weight.numel() > LARGEST or not weight.is_floating_point():
        return False
    return bias is None or (bias.dim() == 1 and len(bias) in weight.shape)


def _orders(weight: Tensor, bias: Tensor | None) -> list[Stored]:
    orders: list[Stored] = ["out_in", "in_out"]
    return [o for o in orders if bias is None or len(bias) == weight.shape[0 if o == "out_in" else 1]]


def _computes(module: nn.Module, stored: Stored) -> bool:
    trials: list[tuple[Tensor, Tensor]] = []
    for probe, drawn in _probes(module):
        if not trials:
            matrix = drawn["weight"] if stored == "out_in" else drawn["weight"].t()
            inputs = [_input((*lead, matrix.shape[1])) for lead in ((3,), (2, 3))]
            trials = [(x, nn.functional.linear(x, matrix, drawn.get("bias"))) for x in inputs]
        for x, expected in trials:
            found = _result(probe, x)
            if found is None or found.shape != expected.shape or not torch.allclose(found, expected):
                return False
    return True


def is_convolution(module: _ConvNd) -> bool:
    """Whether a convolution's own forward is torch's with zeros around the input, as many as it likes on each side.

    The forward is run on a copy with weights of its own, in both modes, on inputs of two sizes.
    """
    dims = len(module.kernel_size)
    if module.transposed or not _holds_no_more(module) or module.weight.numel() > LARGEST:
        return False
    for probe, drawn in _probes(module):
        for size in (9, 12):
            x = _input((2, module.in_channels, *[size] * dims))
            found = _result(probe, x)
            if found is None or found.dim() != x.dim() or not _convolves(module, drawn, x, found):
                return False
    return True


def _holds_no_more(module: nn.Module) -> bool:
    """Whether the module holds a weight and a bias alone: a gain or a mask may be 1 today, and something else tomorrow."""
    held = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    return not module._modules and held <= {"weight", "bias"}


def _convolves(module: _ConvNd, drawn: Mapping[str, Tensor], x: Tensor, found: Tensor) -> bool:
    """Whether some padding makes torch's convolution of x what was found."""
    reach = [(kernel - 1) * wide + 1 for kernel, wide in zip(module.kernel_size, module.dilation, strict=True)]
    needed = [
        max(0, (made - 1) * step + far - size)
        for made, step, far, size in zip(found.shape[2:], module.stride, reach, x.shape[2:], strict=True)
    ]
    for before in product(*map(_from_the_middle, needed)):
        sides = [(first, total - first) for first, total in zip(before, needed, strict=True)]
        padded = nn.functional.pad(x, [side for pair in reversed(sides) for side in pair])
        bias = drawn.get("bias")
        expected = torch.convolution(
            padded, drawn["weight"], bias, module.stride, (0,) * len(sides), module.dilation, False,
            (0,) * len(sides), module.groups,
        )  # fmt: skip
        if expected.shape == found.shape and torch.allclose(found, expected):
            return True
    return False


def _from_the_middle(total: int) -> list[int]:
    """0 to total, the likelier ways to halve it first."""
    return sorted(range(total + 1), key=lambda first: abs(2 * first - total))


def _probes(module: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A copy of the module in training mode, then in eval mode, and the weights drawn for it."""
    generator = torch.Generator("cpu").manual_seed(0)
    probe = module.__new__(type(module))
    probe.__dict__ = dict(module.__dict__)
    drawn = {
        name: nn.Parameter(_drawn(parameter.shape, generator))
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    probe.__dict__["_parameters"] = {**module._parameters, **drawn}
    kept = {name: parameter.detach().clone() for name, parameter in drawn.items()}
    for training in (True, False):
        probe.__dict__["training"] = training
        yield probe, kept


def _drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random numbers; a large tensor repeats as many as a prime says, so that its rows and columns differ all the same."""
    count = math.prod(shape)
    some = torch.randn(min(count, _DIFFERENT), generator=generator, device="cpu", dtype=torch.float32).double()
    return some.repeat(-(-count // max(1, len(some))))[:count].view(shape)


_DIFFERENT = 65_537


def _input(shape: tuple[int, ...]) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64, device="cpu")


def _result(probe: nn.Module, x: Tensor) -> Tensor | None:
    """What the forward makes of x; None where it takes no such input."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            found = type(probe).forward(probe, x)
        except Exception:  # a forward that does not take such an input is no look-alike
            return None
    return found if isinstance(found, Tensor) else None
