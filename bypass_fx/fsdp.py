"""FSDP2 by torch itself, over the layers that accelerate's configuration names where it was launched with one.

accelerate's own `prepare` has FSDP2 on accelerators only, swaps the optimiser's parameters for it, and leaves the outermost
parameters whole between a forward and a backward, when D, the penalty and the checkpoints work with the sharded ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from bypass_fx.settings import SettingsError

if TYPE_CHECKING:
    from accelerate.utils import FullyShardedDataParallelPlugin

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def configured() -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch` was told of FSDP; None where it was not, or was not there.

    Raises:
        SettingsError: it was told what a bypass can't do with.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise SettingsError(
            "accelerate is configured for FSDP 1, whose flat parameters hide W and A; set fsdp_version: 2"
        )
    plugin = FullyShardedDataParallelPlugin()
    refused = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules,
    }
    for name, is_set in refused.items():
        if is_set:
            more = ", and gradient_checkpointing here to yes" if "checkpointing" in name else ""
            raise SettingsError(f"{name} of accelerate's configuration can't be had with a bypass; take it out{more}")
    return plugin


def shard(
    root: nn.Module, model: nn.Module, device: torch.device, plugin: FullyShardedDataParallelPlugin | None
) -> None:
    """Shard a model over all processes, its layers one by one, from the main process's weights as DDP does.

    Args:
        root: what is called: the model, or a module around it.
        model: whose layers are sharded.
        device: where it lies on each process.
        plugin: from `configured`.

    Raises:
        SettingsError: the configuration names layers that the module does not have.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        for tensor in (*root.parameters(), *root.buffers()):
            tensor.data = tensor.contiguous()  # FSDP2 shards no weights whose channels are last; images may be so
            torch.distributed.broadcast(tensor, src=0)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in _layers(model, plugin):
        fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward if plugin else True)
    # The root, too, gives back what it gathered: between forwards every parameter is the sharded one.
    fully_shard(root, mesh=mesh, reshard_after_forward=True)


def _layers(model: nn.Module, plugin: FullyShardedDataParallelPlugin | None) -> list[nn.Module]:
    """The modules whose parameters are gathered together, inner ones first."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    if plugin is None or plugin.auto_wrap_policy is None:
        return [*_listed(model)]
    try:
        chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
    except ValueError as error:
        raise SettingsError(f"{error} Mend fsdp_transformer_layer_cls_to_wrap") from error
    inner_first = reversed([*model.modules()][1:])
    return [each for each in inner_first if chosen(each) and _holds_any(each) and not isinstance(each, _NEVER_CALLED)]


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in a model's lists and sequences, which are its layers in most."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        yield from filter(_holds_any, module)
    else:
        for child in module.children():
            yield from _listed(child)


def _holds_any(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
