"""Values of any nesting with their tensors put aside under names, and put back into the tensors that are there now."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bypass_fx.passes.matrices import placed_like, whole

_TENSOR = "tensor of the snapshot"


def keep(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor in it put aside on the CPU, under a name that begins with the key."""
    if isinstance(value, Tensor):
        tensors[key] = whole(value.detach()).to("cpu", copy=True)
        return {_TENSOR: key, "device": str(value.device)}
    if isinstance(value, Mapping):
        return {name: keep(inner, f"{key}.{name}", tensors) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return _made_like(value, (keep(inner, f"{key}.{index}", tensors) for index, inner in enumerate(value)))
    return copy.deepcopy(value)


def back(value: Any, tensors: Mapping[str, Tensor], current: Any) -> Any:
    """What `keep` was given: in the tensors that are there now where they fit, as a captured step reads those, and in
    mappings of the kind that is there now.
    """
    if isinstance(value, Mapping):
        if _TENSOR in value:
            kept = tensors[value[_TENSOR]]
            if isinstance(current, Tensor) and (current.shape, current.dtype) == (kept.shape, kept.dtype):
                with torch.no_grad():
                    return current.copy_(placed_like(current, kept))
            return kept.to(value["device"], copy=True)
        inside = current if isinstance(current, Mapping) else {}
        made = {name: back(inner, tensors, inside.get(name)) for name, inner in value.items()}
        if isinstance(current, dict) and type(current) is not dict:  # a Counter, say, of milestones
            other = copy.copy(current)
            other.clear()
            other.update(made)
            return other
        return made
    if isinstance(value, list | tuple):
        return _made_like(value, (back(inner, tensors, None) for inner in value))
    return copy.deepcopy(value)


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, texts, tensors and containers alone."""
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str)


def _made_like(example: Any, entries: Iterable[Any]) -> Any:
    return type(example)(*entries) if hasattr(example, "_fields") else type(example)(entries)
