"""What is trained for: the loss of a minibatch, and the metrics over a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bypass_fx.passes.errors import BypassError

TaskName = Literal["classification", "regression", "next-token"]
LossFn = Callable[[nn.Module, Any], Tensor]
IGNORED = -100  # the target that cross-entropy leaves out, as in torch and transformers


class TaskError(BypassError):
    """A model's output, or a user's loss, is not what the task needs."""


@dataclass(frozen=True, slots=True)
class Task:
    """A loss over minibatches, and sums over them from which the scores of a whole set follow.

    Attributes:
        name: "classification", "regression", "next-token" or "custom".
        loss: the mean loss of a minibatch, a 0-dim tensor, from the model and the minibatch.
        sums: from the same: a 1-dim tensor whose sum over a set's minibatches `score` turns into numbers.
        score: {"loss": ..., metric: ...} from those sums.
    """

    name: str
    loss: LossFn
    sums: LossFn
    score: Callable[[list[float]], dict[str, float]]


def task(name: TaskName | str, loss_fn: LossFn | None = None) -> Task:
    """The task of that name, or one with a loss of the user's own.

    Args:
        name: "classification": pairs (x, class), cross-entropy, accuracy. "regression": pairs (x, y), squared error, R².
            "next-token": pairs (tokens, next tokens), cross-entropy a token, accuracy and perplexity; a target of −100
            does not count.
        loss_fn: `loss_fn(model, batch)` gives the mean loss of a minibatch, whatever the data yields.

    Raises:
        TaskError: the name is unknown.

    Example:
        >>> kind = task("regression")
        >>> kind.loss(nn.Identity(), (torch.ones(2), torch.zeros(2)))
        tensor(1.)
    """
    if loss_fn is not None:
        return _custom(loss_fn)
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}; choose from {', '.join(TASKS)}, or pass loss_fn")
    return TASKS[name]


def output_of(model: nn.Module, x: Any) -> Tensor:
    """The tensor that a model makes of x; of an output of transformers, its logits.

    Raises:
        TaskError: the model returns neither.
    """
    output = model(**x) if isinstance(x, dict) else model(x)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TaskError(f"the model returns a {type(output).__name__}; a single tensor is needed, or pass loss_fn")
    return output


def _sum_vector(*values: Tensor | float) -> Tensor:
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])


def _classify(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(output_of(model, x).float(), y)


def _classify_sums(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    output = output_of(model, x).float()
    return _sum_vector(F.cross_entropy(output, y, reduction="sum"), (output.argmax(1) == y).sum(), float(len(y)))


def _classify_score(sums: list[float]) -> dict[str, float]:
    loss, right, count = sums
    return {"loss": loss / count, "accuracy": right / count}


def _regress(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(output_of(model, x).float(), y.float())


def _regress_sums(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    error = F.mse_loss(output_of(model, x).float(), y.float(), reduction="sum")
    wide = y.double()
    return _sum_vector(error, wide.sum(), wide.square().sum(), float(y.numel()))


def _regress_score(sums: list[float]) -> dict[str, float]:
    error, total, squares, count = sums
    spread = squares - total * total / count
    return {"loss": error / count, "r2": 1 - error / spread if spread > 0 else 0.0}


def _predict(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(output_of(model, x).float().flatten(0, -2), y.flatten(), ignore_index=IGNORED)


def _predict_sums(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    output, y = output_of(model, x).float().flatten(0, -2), y.flatten()
    loss = F.cross_entropy(output, y, ignore_index=IGNORED, reduction="sum")
    return _sum_vector(loss, (output.argmax(-1) == y).sum(), (y != IGNORED).sum())


def _predict_score(sums: list[float]) -> dict[str, float]:
    scores = _classify_score(sums)
    return {**scores, "perplexity": torch.tensor(scores["loss"], dtype=torch.float64).exp().item()}


TASKS: dict[str, Task] = {
    "classification": Task("classification", _classify, _classify_sums, _classify_score),
    "regression": Task("regression", _regress, _regress_sums, _regress_score),
    "next-token": Task("next-token", _predict, _predict_sums, _predict_score),
}


def _custom(loss_fn: LossFn) -> Task:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = loss_fn(model, batch)
        if not isinstance(value, Tensor) or value.dim():
            raise TaskError(f"loss_fn returned {type(value).__name__}; a 0-dim tensor is needed, loss.mean(), say")
        return value

    def sums(model: nn.Module, batch: Any) -> Tensor:
        count = float(batch_length(batch))
        return _sum_vector(loss(model, batch).double() * count, count)

    return Task("custom", loss, sums, lambda totals: {"loss": totals[0] / totals[1]})


def batch_length(batch: Any) -> int:
    """How many examples a minibatch holds: the length of the first tensor in it.

    Raises:
        TaskError: there is no tensor in it.
    """
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise TaskError(f"a minibatch of type {type(batch).__name__} holds no tensor; let the data yield tensors")
