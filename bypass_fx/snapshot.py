"""θ* and all that an optimiser remembers at θ*, kept on the CPU or on disk, so that a bypass can be undone bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import param_group
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.matrices import placed_like, whole

_TENSOR = "tensor of the snapshot"


class Snapshot:
    """The parameters and buffers of a model, and the state of its optimiser and of the LR schedulers that drive it.

    Tensors are copied to the CPU, or to a safetensors file; the rest (step counts, hyper-parameters, learning rates) is
    small and stays in memory.

    Args:
        model, optimizer: what is kept; parameters of the optimiser that are none of the model's too.
        where: "cpu", or a folder in which a file is made.
        without: parameters to leave out, those of D, which won't be there when it is put back.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, where: str | Path = "cpu", without: Iterable[nn.Parameter] = ()
    ) -> None:
        left_out = {id(parameter) for parameter in without}
        tensors: dict[str, Tensor] = {}
        for name, tensor in _tensors(model, optimizer, left_out):
            _keep(tensor, name, tensors)
        states = [
            {
                str(index): _keep(holder.state[parameter], f"state.{number}.{index}", tensors)
                for index, parameter in enumerate(_parameters(optimizer, left_out))
                if parameter in holder.state
            }
            for number, holder in enumerate(_holders(optimizer))
        ]
        groups = [
            _keep({key: value for key, value in group.items() if key not in _OF_D}, f"group.{index}", tensors)
            for index, group in enumerate(_groups(optimizer, left_out))
        ]
        drivers = [
            _keep(_plain_part(attributes), f"driver.{index}", tensors)
            for index, attributes in enumerate(_drivers(optimizer))
        ]
        self._rest: dict[str, Any] = {"states": states, "groups": groups, "drivers": drivers}
        self._tensors: dict[str, Tensor] | None = tensors
        self._path: Path | None = None
        if str(where) != "cpu":
            self._path, self._tensors = _to_file(tensors, Path(where)), None

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The snapshot that `state_dict` described."""
        made = cls.__new__(cls)
        made._rest, made._tensors = copy.deepcopy(state["rest"]), state["tensors"]
        made._path = Path(state["path"]) if state["path"] else None
        return made

    def state_dict(self) -> dict[str, Any]:
        """All of it where it lives in memory; its file's name where it lives on disk."""
        return {"rest": self._rest, "tensors": self._tensors, "path": str(self._path) if self._path else ""}

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put everything back, into the same Parameter and buffer objects; gradients, which belong to another point, go.

        Raises:
            BypassError: the file of the snapshot is gone.
        """
        tensors = self._read()
        for name, tensor in _tensors(model, optimizer, set()):
            tensor.copy_(placed_like(tensor, tensors[name]))
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
        parameters = _parameters(optimizer, set())
        for holder, states in zip(_holders(optimizer), self._rest["states"], strict=True):
            for index, parameter in enumerate(parameters):
                if str(index) in states:
                    holder.state[parameter] = _back(states[str(index)], tensors, holder.state.get(parameter))
                else:
                    holder.state.pop(parameter, None)
        for group, kept in zip(optimizer.param_groups, self._rest["groups"], strict=True):
            for key in group.keys() - kept.keys() - _OF_D:
                del group[key]
            group.update({key: _back(value, tensors, group.get(key)) for key, value in kept.items()})
        kept_drivers = list(self._rest["drivers"])
        for attributes in _drivers(optimizer):
            own = _plain_part(attributes)
            match = next((index for index, kept in enumerate(kept_drivers) if kept.keys() == own.keys()), None)
            if match is not None:  # one that was made during the bypass has nothing to go back to
                attributes.update(_back(kept_drivers.pop(match), tensors, None))

    def discard(self) -> None:
        """Forget the tensors and delete the file."""
        self._tensors = {}
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self) -> Mapping[str, Tensor]:
        if self._path is None:
            assert self._tensors is not None, "a snapshot has tensors or a file"
            return self._tensors
        from safetensors.torch import load_file

        if not self._path.exists():
            raise BypassError(f"the snapshot {str(self._path)!r} is gone; go back to a checkpoint of your own")
        return load_file(self._path)


_OF_D = {"params", "param_names"}


def _to_file(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    import os
    import tempfile

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="theta-star-", suffix=".safetensors", dir=folder)
    os.close(handle)
    save_file({key: value.contiguous() for key, value in tensors.items()}, name)
    return Path(name).resolve()


def _tensors(model: nn.Module, optimizer: Optimizer, left_out: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers (those too that no state dict has), then what else the optimiser steps."""
    own = set()
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            own.add(id(tensor))
            if id(tensor) not in left_out:
                yield f"{kind}.{name}", tensor
    for index, parameter in enumerate(_parameters(optimizer, left_out)):
        if id(parameter) not in own:
            yield f"other.{index}", parameter


def _groups(optimizer: Optimizer, left_out: set[int]) -> list[dict[str, Any]]:
    """The optimiser's groups without those that hold D alone."""
    return [
        group
        for group in optimizer.param_groups
        if not group["params"] or any(id(parameter) not in left_out for parameter in group["params"])
    ]


def _parameters(optimizer: Optimizer, left_out: set[int]) -> list[nn.Parameter]:
    return [
        parameter for group in optimizer.param_groups for parameter in group["params"] if id(parameter) not in left_out
    ]


def _holders(optimizer: Optimizer) -> list[Optimizer]:
    """The optimiser and the one inside it, where they keep states of their own."""
    inner = param_group.unwrap(optimizer)
    return [optimizer] if inner.state is optimizer.state else [optimizer, inner]


def _drivers(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """The attributes of the LR schedulers, torch's and timm's; others that hold the optimiser are the user's own."""
    for attributes in param_group.schedulers(optimizer):
        if "_last_lr" in attributes or "base_values" in attributes:
            yield attributes


def _plain_part(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str)


def _keep(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor in it put aside under a key."""
    if isinstance(value, Tensor):
        tensors[key] = whole(value.detach()).to("cpu", copy=True)
        return {_TENSOR: key, "device": str(value.device)}
    if isinstance(value, Mapping):
        return {name: _keep(inner, f"{key}.{name}", tensors) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_keep(inner, f"{key}.{index}", tensors) for index, inner in enumerate(value))
    return copy.deepcopy(value)


def _back(value: Any, tensors: Mapping[str, Tensor], current: Any) -> Any:
    """The value with its tensors; in the tensors that are there now where they fit, as a captured step reads those."""
    if isinstance(value, Mapping):
        if _TENSOR in value:
            kept = tensors[value[_TENSOR]]
            if isinstance(current, Tensor) and (current.shape, current.dtype) == (kept.shape, kept.dtype):
                return current.copy_(placed_like(current, kept))
            return kept.to(value["device"], copy=True)
        inside = current if isinstance(current, Mapping) else {}
        return {name: _back(inner, tensors, inside.get(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_back(inner, tensors, None) for inner in value)
    return copy.deepcopy(value)
