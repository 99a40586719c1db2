"""Where model and data meet: the loss of a minibatch, the scores over a set, and whether the two fit each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bypass_fx.data import Data, Examples, Task, in_order, prepare, size
from bypass_fx.models import ModelError

EVAL_BATCH = 512


def loss_of(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """The mean loss of a minibatch: cross-entropy in a classification, squared error in a regression."""
    return F.cross_entropy(output, target) if task == "classification" else F.mse_loss(output, target)


def evaluate(model: nn.Module, data: Data, examples: Examples) -> tuple[float, float | None]:
    """Mean loss and accuracy (None in a regression) over a set, in evaluation mode; the model's mode is kept."""
    device = next(model.parameters()).device
    was_training = model.training
    loss = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.long, device=device)
    model.eval()
    with torch.no_grad():
        for x, y in in_order(examples, EVAL_BATCH):
            output, target = model(prepare(x.to(device))), y.to(device)
            loss += loss_of(data.task, output, target).double() * len(target)
            if data.task == "classification":
                right += (output.argmax(1) == target).sum()
    model.train(was_training)
    accuracy = right.item() / size(examples) if data.task == "classification" else None
    return loss.item() / size(examples), accuracy


def expect_fit(model: nn.Module, data: Data, device: torch.device) -> float:
    """Model and data must agree on inputs and outputs; returns the floating-point operations that one example takes.

    Raises:
        ModelError: the model can't take the data, or returns what the loss can't.
    """
    x, y = next(in_order(data.train, 2))
    was_training = model.training
    model.eval()
    try:
        # The counter hooks every module, and a compiled one would compile for it: count in the module inside.
        inner = getattr(model, "_orig_mod", model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = inner(prepare(x.to(device)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(
            f"the model can't take inputs of shape {tuple(x.shape[1:])} as {data.name} has them ({reason}); "
            "choose another model or other data"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns a {type(output).__name__}; a single tensor is needed")
    wanted = (len(y), data.outputs) if data.task == "classification" else tuple(y.shape)
    if tuple(output.shape) != wanted:
        raise ModelError(
            f"the model returns shape {tuple(output.shape)} for {len(y)} examples, {data.name} needs {wanted}; "
            f"give the model {data.outputs} outputs"
        )
    return float(counter.get_total_flops()) / len(y)
