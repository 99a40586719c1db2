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
    """The model, without pretrained weights, in eval mode."""
    import timm
    import torchvision

    library, _, model = name.partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device(device):
            if library == "timm":
                built: nn.Module = timm.create_model(model)
            else:
                takes_backbone = ".detection" in torchvision.models.get_model_builder(model).__module__ or (
                    ".segmentation" in torchvision.models.get_model_builder(model).__module__
                )
                options = {"weights_backbone": None} if takes_backbone else {}
                built = torchvision.models.get_model(model, weights=None, **options)
    return built.eval()
