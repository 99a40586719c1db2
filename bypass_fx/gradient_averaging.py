"""D on several processes: whole on each of them, its gradient averaged as DDP and FSDP2 average the others.

Neither learns of parameters that come after it wrapped a model, and neither could give one up at the contraction. D is
small, one number a channel, so each process keeps all of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bypass_fx.passes.errors import SurgeryError
from bypass_fx.passes.matrices import is_sharded


def average_gradients(deltas: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Average the gradient of each parameter over the processes whenever a backward has accumulated into it.

    Averaging what was averaged changes nothing, so gradients may be accumulated over several backwards. Parameters whose
    gradients are averaged already stay as they are.

    Args:
        deltas: the coefficients δ.
        group: the processes; None takes all.
    """
    for delta in deltas:
        hooks: dict[int, Callable[..., None]] = delta._post_accumulate_grad_hooks or {}
        if not any(getattr(hook, "func", None) is _average for hook in hooks.values()):
            delta.register_post_accumulate_grad_hook(partial(_average, group))  # type: ignore[no-untyped-call]


def share_gradients(model: nn.Module, parameters: Iterable[nn.Parameter], deltas: Sequence[nn.Parameter]) -> None:
    """Have D's gradients averaged where those of the model's other parameters are, by DDP or FSDP2."""
    ddp = wrapper_of(model)
    if ddp is not None:
        average_gradients(deltas, ddp.process_group)
    elif any(map(is_sharded, {type(each): each for each in parameters}.values())):
        average_gradients(deltas)


def among_several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP that averages gradients of this model: around it, in it, or around a larger one that holds it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    own = {id(parameter) for parameter in model.parameters()}
    return next((ddp for ddp in _wrappers(model) if any(id(p) in own for p in ddp._module_parameters)), None)


def expect_none_since(model: nn.Module, deltas: Sequence[nn.Parameter]) -> None:
    """Check that no DDP came around a model after D did.

    Raises:
        SurgeryError: one did, and would wait for D's gradients when D is gone.
    """
    ddp = wrapper_of(model)
    if ddp is None or ddp.find_unused_parameters:
        return
    if {id(delta) for delta in deltas} & {id(parameter) for parameter in ddp._module_parameters}:
        raise SurgeryError(
            "the model was wrapped in DistributedDataParallel after D came into it, and that would wait for D's gradients "
            "after the contraction: wrap the model first and extend it then, or set find_unused_parameters=True"
        )


def _wrappers(model: nn.Module) -> Iterator[DistributedDataParallel]:
    yield from (module for module in model.modules() if isinstance(module, DistributedDataParallel))
    # a model does not know what wraps it; no isinstance, which asks proxies for the class of what they stand for
    yield from (found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel))


def _average(group: dist.ProcessGroup | None, parameter: nn.Parameter) -> None:
    if parameter.grad is not None and dist.is_initialized():
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(dist.get_world_size(group))
