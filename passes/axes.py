"""Along which axis the channels of a run's tensors lie: told by the map or the norm that made them, and carried along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_LAST = (
    "linear addmm bilinear embedding embedding_bag layer_norm rms_norm lstm gru rnn_tanh rnn_relu lstm_cell gru_cell"
)
_MADE = dict.fromkeys(_LAST.split(), -1)
_MADE |= {f"{kind}{axes}d": -axes - 1 for kind in ("conv", "conv_transpose") for axes in (1, 2, 3)}
_SECOND = {"batch_norm", "group_norm", "instance_norm"}
_PRODUCTS = {"matmul", "mm", "bmm", "__matmul__", "einsum", "tensordot", "baddbmm", "scaled_dot_product_attention"}
_MOVES = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "__get__", "rot90"}
_RESHAPES = {"reshape", "view", "view_as", "reshape_as", "_unsafe_view"}
_CHANNELS, _POSITIONS = 7, (2, 3, 5, 11, 13, 17, 19)  # the sizes in a trial: they show where the channels went


class ChannelAxes(TorchFunctionMode):
    """Inside, notes where the channels of every tensor are that torch's functions make."""

    def __init__(self) -> None:
        super().__init__()
        self._axes: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> int | None:
        """The axis, counted from the end; None where nothing told it."""
        return self._axes.get(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.dim():
                axis = self._axis(func, args, kwargs or {}, made)
                if axis is not None:
                    self._axes[made] = axis
        return result

    def _axis(self, func: Callable[..., Any], args: Any, kwargs: Any, made: Tensor) -> int | None:
        name = str(getattr(func, "__name__", ""))
        if name in _MADE or name in _SECOND:
            axis = _MADE.get(name, 1 - made.dim())
            return axis if -made.dim() <= axis < 0 else None
        source = None if name in _PRODUCTS else self._source(args, kwargs, made)
        if source is None:
            return None
        axis = self._axes[source]
        if name in _RESHAPES:
            return _reshaped(source.shape, axis, made.shape)
        if name in _MOVES or made.dim() != source.dim():
            writes = "out" in kwargs or (name.endswith("_") and not name.endswith("__"))
            return None if writes else _tried(func, args, kwargs, source, axis, made.dim())
        return axis

    def _source(self, args: Any, kwargs: Any, made: Tensor) -> Tensor | None:
        """The first input whose channels are known, one of the result's rank before all others."""
        known = [each for each in _tensors((args, kwargs)) if each in self._axes]
        return next((each for each in known if each.dim() == made.dim()), known[0] if known else None)


def _tensors(given: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _reshaped(before: torch.Size, axis: int, after: torch.Size) -> int | None:
    """Where an axis is after a reshape that leaves it whole: as many numbers lie in front of it as before."""
    in_front = before[: len(before) + axis].numel()
    kept = (i for i, size in enumerate(after) if size == before[axis] and after[:i].numel() == in_front)
    place = next(kept, None)
    return None if place is None else place - len(after)


def _tried(func: Callable[..., Any], args: Any, kwargs: Any, source: Tensor, axis: int, rank: int) -> int | None:
    """Where an axis is after a call that moves, adds or drops axes: of a trial tensor, the one of its size.

    The call must leave as many axes of it as of the source, which had single items that may be squeezed.
    """
    if source.dim() > len(_POSITIONS):
        return None
    sizes = [1 if size == 1 else other for size, other in zip(source.shape, _POSITIONS, strict=False)]
    sizes[axis] = _CHANNELS
    trial = torch.empty(sizes, device="meta")
    try:
        moved = func(*(trial if each is source else each for each in args), **kwargs)
    except Exception:  # it does not run on these sizes: nothing is told
        return None
    if not isinstance(moved, Tensor) or moved.dim() != rank:
        return None
    places = [i for i, size in enumerate(moved.shape) if size == _CHANNELS]
    return places[0] - moved.dim() if len(places) == 1 else None
