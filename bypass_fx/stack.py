"""Parameters of several models as the rows of one matrix: what is done to each of them is done to all at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from bypass_fx.passes.errors import BypassError

Rows = slice | Tensor


class Stack:
    """The same parameters of several models in one matrix, a model a row; each Parameter becomes a view of it.

    They stay the same objects, and so does whatever holds them: an optimiser, a schedule, the module itself. Their
    gradients are views of a second matrix.

    Args:
        rows: for each model its parameters, in the same order and of the same shapes.
        names: what to call them.

    Raises:
        BypassError: two models differ in a shape, or two parameters in dtype or device.

    Example:
        >>> models = [nn.Linear(2, 1), nn.Linear(2, 1)]
        >>> stack = Stack([[*model.parameters()] for model in models], ["weight", "bias"])
        >>> stack.values.shape
        torch.Size([2, 3])
        >>> _ = stack.values.fill_(7.0)
        >>> models[1].bias
        Parameter containing:
        tensor([7.], requires_grad=True)
    """

    def __init__(self, rows: Sequence[Sequence[nn.Parameter]], names: Sequence[str]) -> None:
        self.rows, self.names = rows, names
        self._shapes = [parameter.shape for parameter in rows[0]]
        _expect_alike(rows, names)
        self.ends = [0, *accumulate(shape.numel() for shape in self._shapes)]
        with torch.no_grad():
            self.values = torch.stack([torch.cat([p.detach().flatten() for p in row]) for row in rows])
        self.gradients = torch.zeros_like(self.values)
        sizes = torch.tensor([shape.numel() for shape in self._shapes])
        self.owners = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.values.device)  # of the columns
        for index, row in enumerate(rows):
            parts = self.row(self.values, index), self.row(self.gradients, index)
            for parameter, value, gradient in zip(row, *parts, strict=True):
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.data = value
                parameter.grad = gradient
        self._parts = self._split(self.values)
        self._gradient_parts = self._split(self.gradients)
        self._whole = [part.detach().requires_grad_() for part in self._parts]

    def row(self, matrix: Tensor, index: int) -> list[Tensor]:
        """One model's part of a matrix like `values`, cut into the shapes of its parameters; views."""
        return [matrix[index, a:b].view(shape) for (a, b), shape in zip(pairwise(self.ends), self._shapes, strict=True)]

    def clear(self) -> None:
        """Set the gradients to 0; a Parameter that lost its own, as optimisers let go of it, has it again."""
        self.gradients.zero_()
        for index, row in enumerate(self.rows):
            if any(parameter.grad is None for parameter in row):
                for parameter, gradient in zip(row, self.row(self.gradients, index), strict=True):
                    parameter.grad = gradient

    def leaves(self, rows: Rows) -> list[Tensor]:
        """The parameters of some models, stacked, as leaves of a graph, [rows, …]."""
        if isinstance(rows, slice) and rows == slice(0, len(self.rows)):
            return self._whole
        return [part[rows].detach().requires_grad_() for part in self._parts]

    def add_gradients(self, rows: Rows, gradients: Sequence[Tensor | None]) -> None:
        """Add to the gradients of some models what a backward gave for their `leaves`."""
        for part, gradient in zip(self._gradient_parts, gradients, strict=True):
            if gradient is None:
                continue
            if isinstance(rows, slice):
                part[rows].add_(gradient)
            else:
                part.index_add_(0, rows, gradient)

    def _split(self, matrix: Tensor) -> list[Tensor]:
        return [
            matrix[:, a:b].view(len(matrix), *shape)
            for (a, b), shape in zip(pairwise(self.ends), self._shapes, strict=True)
        ]


def rows_of(indices: Sequence[int], device: torch.device) -> Rows:
    """Rows by their numbers, as a slice where they follow one another: that copies nothing."""
    if all(b == a + 1 for a, b in pairwise(indices)):
        return slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices, device=device)


def _expect_alike(rows: Sequence[Sequence[nn.Parameter]], names: Sequence[str]) -> None:
    first = rows[0][0]
    for number, row in enumerate(rows):
        for name, parameter, example in zip(names, row, rows[0], strict=True):
            if parameter.shape != example.shape:
                raise BypassError(
                    f"{name} has the shape {tuple(example.shape)} in replica 0 and {tuple(parameter.shape)} in replica "
                    f"{number}; replicas are seeds of one model, built alike"
                )
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise BypassError(
                    f"{name} of replica {number} is {parameter.dtype} on {parameter.device}, and {names[0]} of replica 0 "
                    f"{first.dtype} on {first.device}; bring all replicas to one dtype and device"
                )
