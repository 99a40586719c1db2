"""What a forward reads from its modules, and what of it decides the graph."""

from __future__ import annotations

from enum import Enum
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Read = tuple[str, str, Any]
OF_EVERY_MODULE = vars(nn.Module()).keys()  # the attributes that torch gives every module
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


def as_python(value: Any) -> Any:
    """A number or a text of a kind below Python's own, as NumPy's are, as that: code can write it down. Others unchanged.

    >>> import numpy
    >>> as_python(numpy.sqrt(4.0)), as_python(numpy.int64(3))
    (2.0, 3)
    """
    if isinstance(value, Enum):
        return value
    if isinstance(value, Integral) and type(value).__module__ == "numpy":
        return int(value)
    kinds: tuple[Any, ...] = (int, float, complex, str)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


class Names(Protocol):
    """Where the model keeps its modules and tensors, as paths below an owner; None for what stands elsewhere."""

    def module(self, owner: str, module: nn.Module) -> str | None:
        """The path of a module."""

    def tensor(self, owner: str, tensor: Tensor) -> str | None:
        """The path of a parameter or buffer."""


MISSING = ("missing",)
TENSOR = ("tensor",)  # any tensor, whatever its shape


def inherited(value: Any, names: Names, owner: str) -> tuple[Any, ...]:
    """The fingerprint of what a module has from its class."""
    return fingerprint(value, names, owner) if isinstance(value, PLAIN) else ("inherited",)


def fingerprint(value: Any, names: Names | None = None, owner: str = "") -> tuple[Any, ...]:
    """What of a read decides the graph; equal fingerprints, equal graphs.

    What is read from modules below the owner is noted as well; one from elsewhere must be the same, where names tell.
    """
    if type(value) in PLAIN:
        return (type(value), value)
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape))
    if isinstance(value, nn.Module) and (names is None or names.module(owner, value) is not None):
        return ("module", type(value))
    if isinstance(value, PLAIN):
        return (type(value), value)
    if isinstance(value, list | tuple):
        return (type(value), tuple(fingerprint(item, names, owner) for item in value))
    if isinstance(value, dict):
        return (type(value), tuple((key, fingerprint(item, names, owner)) for key, item in value.items()))
    return ("object", id(value))


def copy_of(value: Tensor) -> Tensor:
    """A tensor like another, which a trace may change in place; its `_version` says whether it was."""
    return value.clone().detach().requires_grad_(value.requires_grad)
