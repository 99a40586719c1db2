"""Weights read from a file into a model: strictly, and with what doesn't fit named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bypass_fx.passes.errors import BypassError

_WRAPPERS = {"module.": "DataParallel's", "_orig_mod.": "torch.compile's"}


class WeightsError(BypassError):
    """A file holds no weights, or none that fit the model."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights, from a .safetensors file or a state dict saved by torch, strictly; else the model stays as it is.

    Raises:
        WeightsError: the file is missing or damaged, or its names or shapes aren't the model's.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"there is no file {str(path)!r}; give --weights a .safetensors file or a saved state dict")
    state = _read(file)
    own = model.state_dict()
    shapes = {name: (state[name].shape, own[name].shape) for name in own if name in state}
    complaints = [
        *_listed("lacks", [name for name in own if name not in state]),
        *_listed("has beside the model's", [name for name in state if name not in own]),
        *_listed("has in another shape", [f"{n} {[*a]} for {[*b]}" for n, (a, b) in shapes.items() if a != b]),
    ]
    if complaints:
        raise WeightsError(f"{str(path)!r} doesn't fit the model: it {', '.join(complaints)}; {_remedy(own, state)}")
    model.load_state_dict(state)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle raise kinds of their own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{str(file)!r} can't be read as weights ({reason}); save it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{str(file)!r} holds no state dict; save model.state_dict() alone")
    return state


def _listed(verb: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{verb} {', '.join(names[:2])}{more}"]


def _remedy(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    for prefix, whose in _WRAPPERS.items():
        if {name.removeprefix(prefix) for name in state} == set(own):
            return f"take {whose} prefix {prefix!r} off its names"
    if any(name.rpartition(".")[2].startswith("delta_") for name in state.keys() - own.keys()):
        return "it was saved in the middle of a bypass: call bypass_fx.contract before saving"
    if own.keys() == state.keys():
        return "give the --data it was trained on, or the model of its width"
    return "give the --model it was saved from"
