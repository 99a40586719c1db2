"""While a forward is traced: tensors made from nothing become nodes, and the numbers of those at hand stay unread."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .recording import FACTORIES, Listener, asked_by_a_forward

_READ_NUMBERS = {
    *(getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "complex", "index", "array", "contains")),
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.equal, torch.equal, torch.is_nonzero),
}


class Factories(TorchFunctionMode):
    """Traces calls that make a tensor from nothing under whatever name the code has them (`from torch import zeros`), and
    refuses to take the number that a tensor has now for the one that it will have in a run.
    """

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.listener.takes(sys._getframe(1), args, kwargs)
        if func in FACTORIES:
            return self.listener.made(func, args, kwargs)
        if func in _READ_NUMBERS and asked_by_a_forward():
            self.listener.refuse("its forward takes the number of a tensor, which may be another in a run")
        return func(*args, **kwargs)


def as_dtype(value: Any) -> Any:
    """`int`, `float`, `bool` and `complex` as the dtypes that torch takes them for: a graph can hold those."""
    return _DTYPES.get(value, value) if type(value) is type else value


_DTYPES: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64, bool: torch.bool, complex: torch.complex128}
