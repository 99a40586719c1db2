"""θ* and all that an optimiser remembers at θ*, kept on the CPU or on disk, so that a bypass can be undone bit for bit."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bypass_fx import param_group
from bypass_fx.kept_values import back, is_plain, keep
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.matrices import placed_like


class Snapshot:
    """The parameters and buffers of a model, and the state of its optimiser and of the LR schedulers that drive it.

    Tensors are copied to the CPU, or to a safetensors file; the rest (step counts, hyper-parameters, learning rates) is
    small and stays in memory. What the optimiser holds only since then (a further group, the D of another model) has
    nothing to go back to and stays as it is.

    Args:
        model, optimizer: what is kept; parameters of the optimiser that are none of the model's too.
        where: "cpu", or a folder in which a file is made.
        without: parameters to leave out, those of D, which won't be there when it is put back.

    Raises:
        BypassError: there is nothing to keep, as the model is on the meta device, or the folder can't be written.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, where: str | Path = "cpu", without: Iterable[nn.Parameter] = ()
    ) -> None:
        if not isinstance(where, str | Path):
            raise BypassError(f"snapshot is {where!r}; give 'cpu', a folder, or None for nowhere")
        left_out = {id(parameter) for parameter in without}
        self._parameters = _parameters(optimizer, left_out)
        tensors: dict[str, Tensor] = {}
        for name, tensor in _tensors(model, self._parameters, left_out):
            if tensor.is_meta:
                raise BypassError(f"{name} is on the meta device and has no values: give the model weights first")
            keep(tensor, name, tensors)
        states = [
            {
                str(index): keep(holder.state[parameter], f"state.{number}.{index}", tensors)
                for index, parameter in enumerate(self._parameters)
                if parameter in holder.state
            }
            for number, holder in enumerate(_holders(optimizer))
        ]
        own = [index for index, group in enumerate(optimizer.param_groups) if not _only_holds(group, left_out)]
        groups = [
            keep({key: value for key, value in optimizer.param_groups[i].items() if key not in _OF_D}, f"group.{i}", tensors)
            for i in own
        ]  # fmt: skip
        self._groups = _members(optimizer, own, left_out)
        self._drivers = list(_drivers(optimizer))
        drivers = [
            keep(_at(_plain_part(attributes), own, len(optimizer.param_groups)), f"driver.{index}", tensors)
            for index, attributes in enumerate(self._drivers)
        ]
        self._rest: dict[str, Any] = {"states": states, "groups": groups, "drivers": drivers}
        self._tensors: dict[str, Tensor] | None = tensors
        self._path: Path | None = None
        if str(where) != "cpu":
            self._path, self._tensors = _to_file(tensors, Path(where)), None

    @classmethod
    def from_state(cls, state: Mapping[str, Any], optimizer: Optimizer, without: Iterable[nn.Parameter] = ()) -> Self:
        """The snapshot that `state_dict` described, for an optimiser whose groups are as they were when it was taken, with
        those of D beside them.
        """
        made = cls.__new__(cls)
        left_out = {id(parameter) for parameter in without}
        made._rest, made._tensors = copy.deepcopy(state["rest"]), state["tensors"]
        made._path = Path(state["path"]) if state["path"] else None
        made._parameters = _parameters(optimizer, left_out)
        own = [index for index, group in enumerate(optimizer.param_groups) if not _only_holds(group, left_out)]
        made._groups = _members(optimizer, own[: len(made._rest["groups"])], left_out)
        made._drivers = []
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
        for name, tensor in _tensors(model, self._parameters, set()):
            if name in tensors:
                tensor.copy_(placed_like(tensor, tensors[name]))
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for holder, states in zip(_holders(optimizer), self._rest["states"], strict=True):
            for index, parameter in enumerate(self._parameters):
                if str(index) in states and id(parameter) in held:
                    holder.state[parameter] = back(states[str(index)], tensors, holder.state.get(parameter))
                else:
                    holder.state.pop(parameter, None)
        places, pairs = self._places(optimizer), [*self._paired(optimizer)]
        # A scheduler made since has no state to go back to, and goes on from the rates that it has set.
        led = _OF_SCHEDULERS if len(pairs) < len([*_drivers(optimizer)]) else set()
        for index, place in places.items():
            group, kept = optimizer.param_groups[place], self._rest["groups"][index]
            for key in group.keys() - kept.keys() - _OF_D - _OF_SCHEDULERS:
                del group[key]
            group.update({key: back(kept[key], tensors, group.get(key)) for key in kept.keys() - led})
        for attributes, kept in pairs:
            for key, value in kept.items():
                put = back(value, tensors, attributes.get(key))
                attributes[key] = _put_at(put, places, attributes.get(key)) if key in _PER_GROUP else put

    def discard(self) -> None:
        """Forget the tensors and delete the file."""
        self._tensors, self._parameters, self._groups, self._drivers = {}, [], [], []
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _places(self, optimizer: Optimizer) -> dict[int, int]:
        """Where each kept group is now: the one that holds its parameters, if there is one still."""
        found: dict[int, int] = {}
        for index, members in enumerate(self._groups):
            for place, group in enumerate(optimizer.param_groups):
                same = _only_holds(group, members) if members else not group["params"]
                if (same or param_group.holds(group, members)) and place not in found.values():
                    found[index] = place
                    break
        return found

    def _paired(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
        """The schedulers that are there now, each with what was kept of it.

        In the process that took the snapshot they are the same objects; in another one, those that are most alike. One
        that was made during the bypass has nothing to go back to.
        """
        kept = dict(enumerate(self._rest["drivers"]))
        known = {id(attributes): index for index, attributes in enumerate(self._drivers)}
        strange = []
        for attributes in _drivers(optimizer):
            if id(attributes) in known:
                yield attributes, kept.pop(known[id(attributes)])
            else:
                strange.append(attributes)
        if self._drivers:
            return
        for attributes in strange:
            own = keep(_plain_part(attributes), "", {})
            alike = {
                index: sum(own[key] == other[key] for key in own)
                for index, other in kept.items()
                if other.keys() == own.keys()
            }
            if alike:
                yield attributes, kept.pop(max(alike, key=alike.__getitem__))

    def _read(self) -> Mapping[str, Tensor]:
        if self._path is None:
            assert self._tensors is not None, "a snapshot has tensors or a file"
            return self._tensors
        from safetensors.torch import load_file

        if not self._path.exists():
            raise BypassError(f"the snapshot {str(self._path)!r} is gone; go back to a checkpoint of your own")
        return load_file(self._path)


_OF_D = {"params", "param_names"}
_OF_SCHEDULERS = {*param_group.RATES, "max_momentum", "base_momentum"}
_PER_GROUP = {*param_group.RATE_LISTS, *param_group.OTHER_LISTS}


def _to_file(tensors: Mapping[str, Tensor], folder: Path) -> Path:
    from safetensors.torch import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="theta-star-", suffix=".safetensors", dir=folder)
    except OSError as error:
        raise BypassError(
            f"snapshot={str(folder)!r} can't be written ({error}); give another folder, or 'cpu'"
        ) from error
    os.close(handle)
    save_file({key: value.contiguous() for key, value in tensors.items()}, name)
    return Path(name).resolve()


def _tensors(model: nn.Module, stepped: Iterable[nn.Parameter], left_out: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers (those too that no state dict has), then what else the optimiser steps."""
    own = set()
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            own.add(id(tensor))
            if id(tensor) not in left_out:
                yield f"{kind}.{name}", tensor
    for index, parameter in enumerate(stepped):
        if id(parameter) not in own:
            yield f"other.{index}", parameter


def _only_holds(group: Mapping[str, Any], ids: set[int]) -> bool:
    return bool(group["params"]) and all(id(parameter) in ids for parameter in group["params"])


def _members(optimizer: Optimizer, indices: Iterable[int], left_out: set[int]) -> list[set[int]]:
    """The parameters of each of these groups, without D."""
    return [{id(p) for p in optimizer.param_groups[index]["params"]} - left_out for index in indices]


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
    return {key: value for key, value in attributes.items() if is_plain(value)}


def _at(attributes: dict[str, Any], own: list[int], count: int) -> dict[str, Any]:
    """The attributes, of what lists one entry a group those of these groups."""
    for key in _PER_GROUP & attributes.keys():
        if isinstance(listed := attributes[key], list) and len(listed) == count:
            attributes[key] = [listed[index] for index in own]
    return attributes


def _put_at(put: Any, places: Mapping[int, int], current: Any) -> Any:
    """The entries of the groups at their places in the list that is there now."""
    if not (isinstance(put, list) and isinstance(current, list)):
        return put
    merged = list(current)
    for index, place in places.items():
        if index < len(put) and place < len(merged):
            merged[place] = put[index]
    return merged
