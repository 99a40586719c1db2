"""Inputs to run a model on: those that the user gives, or that a library's models usually take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .passes.errors import PlanError
from .passes.units import ExampleInputs


def as_inputs(given: ExampleInputs | Tensor | None) -> ExampleInputs | None:
    """Example inputs as the user gives them: a tensor alone is the only argument.

    Raises:
        PlanError: they are none.
    """
    if not (given is None or isinstance(given, Iterable)):
        raise PlanError(
            f"example_inputs is {given!r}; give a tuple of positional or a dict of keyword arguments of the model's forward"
        )
    return (given,) if isinstance(given, Tensor) else given


def usual_inputs(model: nn.Module) -> tuple[Any, ...] | None:
    """One batch of the model's usual input shape, on its device; None where nothing tells it.

    Example:
        >>> usual_inputs(nn.Linear(2, 2)) is None
        True
    """
    return _timm(model) or _torchvision(model)


def _timm(model: nn.Module) -> tuple[Any, ...] | None:
    """timm writes the input size of the pretrained weights on every model."""
    configuration = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = configuration.get("input_size") if isinstance(configuration, dict) else None
    return (_batch(model, 1, *size),) if size else None


def _torchvision(model: nn.Module) -> tuple[Any, ...] | None:
    """torchvision's tasks each have a usual size."""
    library, _, task = type(model).__module__.partition(".models")
    if library != "torchvision":
        return None
    if task.startswith(".detection"):
        return ([_batch(model, 3, 320, 320)],)
    if task.startswith(".video"):
        return (_batch(model, 1, 3, 16, 224, 224),)
    if task.startswith(".optical_flow"):
        return _batch(model, 1, 3, 128, 128), _batch(model, 1, 3, 128, 128)
    side = 299 if task.endswith("inception") else 224
    return (_batch(model, 1, 3, side, side),)


def _batch(model: nn.Module, *shape: int) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.empty(shape, dtype=like.dtype, device=like.device)
