"""Optimiser steps that some parameters take only a part of, or some of their entries not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx.param_group import unwrap


class DampedStep:
    """Lets each optimiser step move the given parameters by `factor()` of the way, from 0 to 1.

    They need no group of their own, and the optimiser's state does not see it.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> damped = DampedStep(optimizer, [weight], lambda: 0.25)
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step(); weight.item()
        0.75
        >>> damped.remove()
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], factor: Callable[[], float]) -> None:
        self._parameters, self._factor = parameters, factor
        self._before: list[Tensor] = []
        plain = unwrap(optimizer)
        self._handles = (plain.register_step_pre_hook(self._keep), plain.register_step_post_hook(self._draw_back))

    def remove(self) -> None:
        """Let the steps be whole again."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, *_: Any) -> None:
        self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _draw_back(self, *_: Any) -> None:
        factor = self._factor()
        if factor != 1:
            for parameter, before in zip(self._parameters, self._before, strict=True):
                parameter.copy_(torch.lerp(before, parameter, factor))
        self._before = []


class HeldStill:
    """Keeps the entries of parameters at 0 where a mask is 0, in whatever way the optimiser steps.

    Their gradients are 0 as they arrive, so they weigh in no norm that it or a clipping takes, and in no step that LBFGS
    makes up from several of them.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> held = HeldStill(optimizer, {weight: torch.tensor([1.0, 0.0])})
        >>> weight.sum().backward()
        >>> optimizer.step(); weight.tolist(), weight.grad.tolist()
        ([-1.0, 0.0], [1.0, 0.0])
        >>> held.remove()
    """

    def __init__(self, optimizer: Optimizer, masks: Mapping[nn.Parameter, Tensor]) -> None:
        self._masks = masks
        plain = unwrap(optimizer)
        self._handles = (
            *(parameter.register_hook(mask.mul) for parameter, mask in masks.items()),  # type: ignore[no-untyped-call]
            plain.register_step_pre_hook(self._mask_gradients),  # those that were set by hand
            plain.register_step_post_hook(self._hold),  # weight decay needs no gradient
        )

    def remove(self) -> None:
        """Let all entries move."""
        for handle in self._handles:
            handle.remove()

    def _mask_gradients(self, *_: Any) -> None:
        for parameter, mask in self._masks.items():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def _hold(self, *_: Any) -> None:
        for parameter, mask in self._masks.items():
            parameter.mul_(mask)
