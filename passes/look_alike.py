"""Modules that act like a Linear without being one: found by what they compute, whatever their forward looks like."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Stored = Literal["out_in", "in_out"]

LARGEST = 2**24  # elements of a weight that are tried out


def linear_look_alike(module: nn.Module) -> Stored | None:
    """How a module's weight is stored, where its forward is x ↦ x Wᵀ + b on the last axis; None for other modules.

    The forward is run on a copy with weights of its own, in both modes, on inputs of two and of three axes.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if weight is None or module._modules or not own <= {"weight", "bias"} or type(module).forward is nn.Linear.forward:
        return None
    if weight.dim() != 2 or weight.numel() > LARGEST or not weight.is_floating_point():
        return None
    if bias is not None and (bias.dim() != 1 or len(bias) not in weight.shape):
        return None
    return next((stored for stored in _orders(weight, bias) if _computes(module, stored)), None)


def _orders(weight: Tensor, bias: Tensor | None) -> list[Stored]:
    orders: list[Stored] = ["out_in", "in_out"]
    return [o for o in orders if bias is None or len(bias) == weight.shape[0 if o == "out_in" else 1]]


def _computes(module: nn.Module, stored: Stored) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    probe = module.__new__(type(module))
    probe.__dict__ = dict(module.__dict__)
    drawn = {
        name: nn.Parameter(torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu"))
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    probe.__dict__["_parameters"] = {**module._parameters, **drawn}
    matrix = drawn["weight"] if stored == "out_in" else drawn["weight"].t()
    with torch.no_grad():
        for training in (True, False):
            probe.__dict__["training"] = training
            for lead in ((3,), (2, 3)):
                x = 3 * torch.randn((*lead, matrix.shape[1]), generator=generator, dtype=torch.float64, device="cpu")
                expected = nn.functional.linear(x, matrix, drawn.get("bias"))
                try:
                    found = type(module).forward(probe, x)
                except Exception:  # a forward that does not take such an input is no look-alike
                    return False
                if (
                    not isinstance(found, Tensor)
                    or found.shape != expected.shape
                    or not torch.allclose(found, expected)
                ):
                    return False
    return True
