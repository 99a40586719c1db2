"""Every model of timm and of torchvision, built without memory for its weights where that is possible."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn


def names() -> Iterator[str]:
    """`timm:NAME` for every model of timm, then `torchvision:NAME` for every model of torchvision."""
    import timm
    import torchvision

    yield from (f"timm:{name}" for name in timm.list_models())
    yield from (f"torchvision:{name}" for name in torchvision.models.list_models())


def build(name: str, device: str = "meta") -> nn.Module:
    """The model, without pretrained weights, in eval mode; on the CPU where its library can't build it on meta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device(device):
                return _make(name).eval()
        except NotImplementedError:  # an initialisation that reads back what it made
            return _make(name).eval()


def _make(name: str) -> nn.Module:
    import timm
    import torchvision

    library, _, model = name.partition(":")
    if library == "timm":
        made: nn.Module = timm.create_model(model)
        return made
    task = torchvision.models.get_model_builder(model).__module__
    has_backbone = ".detection" in task or ".segmentation" in task
    options = {"weights_backbone": None} if has_backbone else {}
    found: nn.Module = torchvision.models.get_model(model, weights=None, **options)
    return found
