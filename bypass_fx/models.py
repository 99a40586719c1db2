"""A model from its name: built in, from timm, from torchvision, or from a factory of the user's own."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx.nearest import did_you_mean
from bypass_fx.passes.errors import BypassError


class ModelError(BypassError):
    """A model can't be found, built or fitted to the data, or a checkpoint doesn't fit it."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What the data asks of a model: the shape of one input (without the batch) and the number of outputs."""

    shape: tuple[int, ...]
    outputs: int

    @property
    def channels(self) -> int:
        """Channels of an image, or features of a vector."""
        return self.shape[0]


def mlp(fit: Fit, hidden: tuple[int, ...] = (5, 5)) -> nn.Sequential:
    """A dense network with a ReLU after each hidden layer, so narrow that its training slows down far from zero loss.

    Example:
        >>> sum(p.numel() for p in mlp(Fit((64,), 10)).parameters())
        415
    """
    widths = (math.prod(fit.shape), *hidden)
    layers: list[nn.Module] = [nn.Flatten()] if len(fit.shape) > 1 else []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], fit.outputs))


class TwoConvTwoDense(nn.Module):
    """The 2c2d network of the paper's Sec. V-B: two 5x5 convolutions, each with 2x2 max pooling, and two dense layers.

    Example:
        >>> sum(p.numel() for p in TwoConvTwoDense(Fit((3, 32, 32), 10)).parameters())
        1703370
    """

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        if len(fit.shape) != 3 or min(fit.shape[1:]) < 16:
            raise ModelError(f"2c2d takes images from 16x16 pixels up, the data has {_shape(fit)}; take the model mlp")
        height, width = (((side - 4) // 2 - 4) // 2 for side in fit.shape[1:])
        self.conv1 = nn.Conv2d(fit.channels, 32, 5)
        self.conv2 = nn.Conv2d(32, 64, 5)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(64 * height * width, 1024)
        self.fc2 = nn.Linear(1024, fit.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, outputs], of images, [batch, channels, height, width]."""
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


BUILTIN: dict[str, tuple[Callable[[Fit], nn.Module], Fit]] = {
    "mlp": (mlp, Fit((64,), 10)),
    "2c2d": (TwoConvTwoDense, Fit((3, 32, 32), 10)),
}

_FORMS = "write mlp, 2c2d, timm:NAME, torchvision:NAME or package.module:factory"

# Auxiliary heads return a tuple in training; the flag silences a warning about the initialisation of these two.
_TORCHVISION_EXTRA: dict[str, dict[str, Any]] = {
    name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")
}


def takes_vectors(name: str) -> bool:
    """Whether a model reads flat vectors, where the data can be had both flat and as images."""
    return name == "mlp"


def build_empty(name: str, fit: Fit | None = None) -> nn.Module:
    """The model called `name`, to look at: as `build`, but timm's and torchvision's hold no memory for weights, unless
    their code reads back what it makes, as that of torchvision's RegNets does.

    Raises:
        ModelError: as `build`.
    """
    if not name.startswith(("timm:", "torchvision:")):
        return build(name, fit)
    try:
        with torch.device("meta"):
            return build(name, fit)
    except ModelError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
        return build(name, fit)


def build(name: str, fit: Fit | None = None) -> nn.Module:
    """Build the model called `name`, with new weights, for the shape and outputs in `fit`, else for its own defaults.

    `name` is "mlp", "2c2d", "timm:NAME", "torchvision:NAME" or "package.module:factory". A factory is handed those of
    `num_classes`, `in_chans`, `in_features` and `input_shape` that its signature names.

    Raises:
        ModelError: the name is unknown (the nearest names are offered), or the model can't be built for this data.

    Example:
        >>> build("mlp", Fit((2,), 1))[-1]
        Linear(in_features=5, out_features=1, bias=True)
    """
    if name in BUILTIN:
        make, default = BUILTIN[name]
        return make(fit or default)
    source, colon, rest = name.partition(":")
    if not colon:
        raise ModelError(f"unknown model {name!r}; {_nearest(name, _every_name())}")
    if source == "timm":
        return _from_timm(rest, fit)
    if source == "torchvision":
        return _from_torchvision(rest, fit)
    return _from_factory(source, rest, fit)


def _from_timm(name: str, fit: Fit | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}; {_nearest(name, timm.list_models(), 'timm:')}")
    wanted: dict[str, Any] = {}
    if fit:
        _expect_image(f"timm:{name}", fit)
        wanted = {"num_classes": fit.outputs, "in_chans": fit.channels}
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.fixed_input_size:
            wanted["img_size"] = fit.shape[1:]
    return _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **wanted), fit)


def _from_torchvision(name: str, fit: Fit | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ModelError(f"torchvision has no model {name!r}; {_nearest(name, models.list_models(), 'torchvision:')}")
    wanted: dict[str, Any] = {"weights": None, **_TORCHVISION_EXTRA.get(name, {})}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        wanted["weights_backbone"] = None
    if fit:
        _expect_image(f"torchvision:{name}", fit)
        if fit.channels != 3:
            raise ModelError(
                f"torchvision:{name} takes images of 3 channels, the data has {_shape(fit)}; timm's models take any"
            )
        wanted["num_classes"] = fit.outputs
    return _made(f"torchvision:{name}", lambda: models.get_model(name, **wanted), fit)


def _from_factory(module_name: str, attribute: str, fit: Fit | None) -> nn.Module:
    name = f"{module_name}:{attribute}"
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(f"model {name!r}: {module_name} imports {error.name}, which is not installed") from error
        raise ModelError(
            f"unknown model {name!r}: no module {module_name!r} here or on the path; {_nearest(name, _every_name())}"
        ) from error
    except ValueError as error:
        raise ModelError(f"unknown model {name!r}; {_FORMS}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"module {module_name!r} has no factory {attribute!r}; {_nearest(attribute, public)}")
    if isinstance(factory, nn.Module):
        raise ModelError(f"{name!r} is a model already; name a function that makes it, such as `lambda: {attribute}`")
    wanted: dict[str, Any] = {}
    if fit:
        features = math.prod(fit.shape)
        offered = {
            "num_classes": fit.outputs,
            "in_chans": fit.channels,
            "in_features": features,
            "input_shape": fit.shape,
        }
        accepted = inspect.signature(factory).parameters
        wanted = {key: value for key, value in offered.items() if key in accepted}
    return _made(name, lambda: factory(**wanted), fit)


def _made(name: str, make: Callable[[], Any], fit: Fit | None) -> nn.Module:
    """Call a foreign constructor; whatever it raises becomes one line that says for which data it was called."""
    try:
        model = make()
    except Exception as error:
        wanted = f" for inputs of shape {_shape(fit)} and {fit.outputs} outputs" if fit else ""
        raise ModelError(f"model {name!r} can't be built{wanted}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} gave a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _expect_image(name: str, fit: Fit) -> None:
    if len(fit.shape) != 3:
        raise ModelError(f"{name} takes images, the data has vectors of {_shape(fit)}; take the model mlp")


def _shape(fit: Fit) -> str:
    return "x".join(map(str, fit.shape))


def _every_name() -> list[str]:
    import timm
    from torchvision import models

    return [
        *BUILTIN,
        *(f"torchvision:{name}" for name in models.list_models()),
        *(f"timm:{name}" for name in timm.list_models()),
    ]


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The nearest names, first as they stand, then without their source: "resnet18" is near to "timm:resnet18"."""
    names = [prefix + entry for entry in known]
    same_tail = [entry for entry in names if entry.rpartition(":")[2] == name.rpartition(":")[2]]
    if same_tail:
        return f"did you mean {', '.join(same_tail)}?"
    return did_you_mean(prefix + name, names, _FORMS)
