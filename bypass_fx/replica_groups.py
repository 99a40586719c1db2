"""Replicas by what they have in common: those with the same sites, and those that go through the model together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bypass_fx.passes.plan import Site
from bypass_fx.stack import Rows, Stack

Function = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Group:
    """Replicas with the same sites, none where they are not extended, and the stack of their D."""

    rows: list[int]
    sites: tuple[Site, ...]
    deltas: Stack | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Replicas that go through the model together: their tensors, stacked; one alone goes as the model that it is."""

    numbers: list[int]
    rows: Rows
    sites: tuple[Site, ...]
    stacks: list[tuple[Stack, Rows]]
    leaves: list[list[Tensor]]  # of each of the stacks
    fixed: dict[str, Tensor]

    @property
    def alone(self) -> bool:
        """Whether it is one replica."""
        return len(self.numbers) == 1

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every stacked tensor by its name in the model."""
        for (stack, _), leaves in zip(self.stacks, self.leaves, strict=True):
            yield from zip(stack.names, leaves, strict=True)
        yield from self.fixed.items()


class Call(nn.Module):
    """A function of a model as a module, for `functional_call`."""

    def __init__(self, model: nn.Module, function: Function) -> None:
        super().__init__()
        self.model, self._function = model, function

    def forward(self, batch: Any) -> Any:
        return self._function(self.model, batch)
