"""D on several processes: whole on each of them, its gradient averaged as DDP and FSDP2 average the others.

Neither learns of parameters that come after it wrapped a model, and neither could give one up at the contraction. D is
small, one number a channel, so each process keeps all of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn


def average_gradients(deltas: Iterable[nn.Parameter]) -> None:
    """Average the gradient of each parameter over all processes whenever a backward has accumulated into it.

    Averaging what was averaged changes nothing, so gradients may be accumulated over several backwards.
    """
    for delta in deltas:
        delta.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]


def _average(parameter: nn.Parameter) -> None:
    if parameter.grad is not None and dist.is_initialized():
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(dist.get_world_size())
