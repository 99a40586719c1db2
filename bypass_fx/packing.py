"""State as two parts that need no pickle: a tree that JSON can hold, and the tensors in it by name for safetensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bypass_fx.passes.errors import BypassError

_TENSOR, _PAIRS, _TUPLE, _NUMBER = "§tensor", "§pairs", "§tuple", "§number"


class PackingError(BypassError):
    """A state holds something that is neither data nor a tensor."""


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists, tuples, numbers, texts and tensors into a tree for JSON and the tensors.

    Raises:
        PackingError: something else is in it; names where.

    Example:
        >>> tree, tensors = pack({0: {"exp_avg": torch.ones(2)}, "betas": (0.9, 0.999)})
        >>> unpack(tree, tensors)
        {0: {'exp_avg': tensor([1., 1.])}, 'betas': (0.9, 0.999)}
    """
    tensors: dict[str, Tensor] = {}
    return _pack(state, "", tensors), tensors


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(unpack(value, tensors) for value in tree[_TUPLE])
    if _NUMBER in tree:
        return float(tree[_NUMBER])
    if _PAIRS in tree:
        return {key: unpack(value, tensors) for key, value in tree[_PAIRS]}
    return {key: unpack(value, tensors) for key, value in tree.items()}


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = where or "value"
        # In memory of its own: safetensors refuses tensors that share theirs.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise PackingError(
                    f"{where or 'the state'} is keyed by a {type(key).__name__}, not by names or numbers"
                )
        items = [(key, _pack(inner, f"{where}/{key}", tensors)) for key, inner in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("§") for key in value)
        return dict(items) if plain else {_PAIRS: [[key, inner] for key, inner in items]}
    if isinstance(value, list | tuple):
        packed = [_pack(inner, f"{where}/{index}", tensors) for index, inner in enumerate(value)]
        return packed if isinstance(value, list) else {_TUPLE: packed}
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: str(value)}  # JSON has no NaN and no infinity
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    raise PackingError(
        f"{where or 'the state'} holds a {type(value).__name__}, which can't be saved without pickle; take another optimizer"
    )
