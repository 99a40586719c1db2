"""What the projections and contractions inside a schedule do to the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn

from bypass_fx import surgery

Jumps = list[tuple[nn.Module, float]]


@contextmanager
def watching(loss: Callable[[nn.Module], float]) -> Iterator[Jumps]:
    """Inside, note with the model the relative change of its loss by each projection and each contraction."""
    jumps: Jumps = []

    def watched(act: Callable[..., Any]) -> Callable[..., Any]:
        def watch(model: nn.Module, *arguments: Any) -> Any:
            then = loss(model)
            result = act(model, *arguments)
            jumps.append((model, abs(loss(model) - then) / then))
            return result

        return watch

    project, contract = watched(surgery.project), watched(surgery.contract)
    with mock.patch.object(surgery, "project", project), mock.patch.object(surgery, "contract", contract):
        yield jumps
