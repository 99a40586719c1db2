"""A short finished run, and settings for one that takes a second."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx.data import Data, Examples, load
from bypass_fx.evaluation import total_of
from bypass_fx.models import Fit, build
from bypass_fx.settings import Settings
from bypass_fx.task import task
from bypass_fx.trainer import Trainer


def digits() -> Data:
    return load("digits", vectors=True)


def mlp(data: Data, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("mlp", Fit(data.shape, data.outputs))


def short(**changes: Any) -> Settings:
    """Two epochs of each phase."""
    return Settings(**{"train1": 2, "opt1": 2, "opt2": 2, "train3": 2, "batch_size": 256, **changes})


def trainer(**changes: Any) -> Trainer:
    data = digits()
    return Trainer(mlp(data), data, short(**changes))


def scores(model: nn.Module, data: Data, examples: Examples) -> dict[str, float]:
    """The loss and the metrics over a set, in evaluation mode."""
    kind, training = task(data.task), model.training
    sums = total_of(partial(kind.sums, model.eval()), data, examples, torch.device("cpu"))
    model.train(training)
    return kind.score(sums.tolist())


def kill(layer: nn.Module, *channels: int) -> None:
    """What the layer makes there is far below 0, whatever it is given."""
    assert isinstance(layer.bias, Tensor)
    with torch.no_grad():
        layer.bias[list(channels)] = -30.0
