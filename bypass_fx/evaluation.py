"""Where model and data meet: the scores over a set, and whether the two fit each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bypass_fx.data import Data, Examples
from bypass_fx.feed import Shares, in_order, placed
from bypass_fx.models import ModelError
from bypass_fx.task import Task, TaskError, batch_length, output_of


@torch.no_grad()
def total_of(
    sums: Any,
    data: Data,
    examples: Examples,
    device: torch.device,
    shares: Shares | None = None,
    channels_last: bool = False,
    workers: int = 0,
) -> Tensor:
    """What `sums` adds up to over this process's share of a set."""
    total: Tensor | None = None
    for batch, counts in in_order(examples, shares=shares, collate=data.collate, workers=workers):
        here = sums(placed(batch, device, channels_last)).detach() * counts
        total = here if total is None else total + here
    assert total is not None
    return total


def expect_fit(model: nn.Module, data: Data, kind: Task, device: torch.device) -> float:
    """Model and data must agree on inputs and outputs; returns the floating-point operations that one example takes.

    Raises:
        ModelError: the model can't take the data, or returns what the loss can't.
    """
    batch = placed(next(in_order(data.train, 2, collate=data.collate))[0], device)
    was_training = model.training
    model.eval()
    # The counter hooks every module, and a compiled one would compile for it: count in the module inside.
    inner = getattr(model, "_orig_mod", model)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = kind.loss(inner, batch) if kind.name == "custom" else output_of(inner, batch[0])
    except TaskError as error:
        raise ModelError(str(error)) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        shape = f"inputs of shape {data.shape}" if data.shape else "the minibatches"
        what = "the model, or loss_fn," if kind.name == "custom" else "the model"
        raise ModelError(
            f"{what} can't take {shape} as {data.name} has them ({reason}); choose another model or other data"
        ) from error
    finally:
        model.train(was_training)
    if kind.name != "custom":
        _expect_output(output, batch[1], data, kind)
    return float(counter.get_total_flops()) / batch_length(batch)


def _expect_output(output: Tensor, y: Tensor, data: Data, kind: Task) -> None:
    found, targets = tuple(output.shape), tuple(y.shape)
    wanted: tuple[Any, ...] = targets
    if kind.name == "next-token":
        wanted = (*targets, data.outputs or "vocabulary")
    elif kind.name == "classification":
        wanted = (len(y), data.outputs or "classes")
    fits = len(found) == len(wanted) and all(isinstance(w, str) or w == f for w, f in zip(wanted, found, strict=True))
    if not fits:
        raise ModelError(
            f"the model returns shape {found} for {len(y)} examples, {data.name} needs {wanted}; "
            f"give the model {data.outputs or 'as many'} outputs"
        )
