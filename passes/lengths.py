"""Example inputs of other lengths: an axis that becomes shorter with them holds positions, and no channels."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .units import Arguments

_MOST = 4  # lengths that are tried


def shorter(arguments: Arguments) -> Iterator[Arguments]:
    """The inputs with all axes of positions of one length shorter by one, for each length.

    Example:
        >>> import torch
        >>> tokens, features = torch.ones(2, 5).long(), torch.ones(2, 5, 3)
        >>> [[each.shape for each in less.args] for less in shorter(Arguments((tokens, features), {}))]
        [[torch.Size([2, 4]), torch.Size([2, 4, 3])]]
    """
    tensors = [leaf for leaf in tree_leaves(tuple(arguments)) if isinstance(leaf, Tensor)]
    lengths = dict.fromkeys(tensor.shape[axis] for tensor in tensors for axis in _positions(tensor))
    for length in [length for length in lengths if length > 1][:_MOST]:

        def cut(tensor: Tensor, length: int = length) -> Tensor:
            for axis in _positions(tensor):
                tensor = tensor.narrow(axis, 0, length - 1) if tensor.shape[axis] == length else tensor
            return tensor

        yield Arguments(*tree_map_only(Tensor, cut, tuple(arguments)))


def _positions(tensor: Tensor) -> list[int]:
    """The axes of an input that hold positions: none is the batch's, and one of numbers is that of the features."""
    features = 1 if tensor.dim() in (4, 5) else tensor.dim() - 1
    return [axis for axis in range(1, tensor.dim()) if axis != features or not tensor.is_floating_point()]
