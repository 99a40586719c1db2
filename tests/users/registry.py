"""The models by name, each with what makes it and what makes its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

USERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {}


def user(*shapes: tuple[int, ...]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a model, with the shapes of its inputs."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        USERS[cls.__name__] = (cls, lambda: tuple(torch.randn(shape) for shape in shapes))
        return cls

    return enter
