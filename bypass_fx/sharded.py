"""State in whole tensors: of a sharded model or optimiser, gathered from all processes, and given back in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from bypass_fx.passes.matrices import is_sharded, placed_like, whole


@torch.no_grad()
def gathered(state: Any) -> Any:
    """A state dict with its sharded tensors whole; all processes must call this together."""
    return tree_map_only(Tensor, whole, state)


@torch.no_grad()
def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a model, sharded or not, under exactly its names.

    Raises:
        KeyError: a name is missing, or one too many.
    """
    own = model.state_dict()
    if own.keys() != state.keys():
        raise KeyError(f"names {sorted(own.keys() ^ state.keys())[:3]} are in one of model and state only")
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            tensor.copy_(placed_like(tensor, state[name]))


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict of whole tensors into an optimiser of parameters that may be sharded.

    Raises:
        ValueError: the groups are others.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    by_index = dict(zip(indices, parameters, strict=True))
    placed = {index: _map_shaped(value, by_index[index]) for index, value in state["state"].items()}
    optimizer.load_state_dict({**state, "state": placed})


def _map_shaped(value: Any, parameter: Tensor) -> Any:
    """A parameter's optimiser state; whatever has the parameter's shape is sharded as it is."""

    def place(tensor: Tensor) -> Tensor:
        if not (is_sharded(parameter) and tensor.shape == parameter.shape):
            return tensor
        return placed_like(parameter, tensor)

    return tree_map_only(Tensor, place, value)


def frugal(compute: Callable[[], Tensor]) -> Tensor:
    """A number computed from gathered weights, which are let go and gathered anew in the backward.

    Otherwise the whole of every site's A and W would stay in memory until then. Gathering gives each gradient back in
    its parameter's placement.
    """
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return compute()
    result: Tensor = checkpoint(compute, use_reentrant=False, preserve_rng_state=False)
    return result
