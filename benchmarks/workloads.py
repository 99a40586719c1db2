"""The models whose training steps are timed, with batches that two cores take in a few seconds, or a GPU at full load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bypass_fx import models


class CharBlock(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class CharTransformer(nn.Module):
    """A language model over 96 characters: (batch, tokens) to (batch · tokens, 96)."""

    def __init__(self, blocks: int = 12, width: int = 256, heads: int = 4, tokens: int = 128) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(96, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*[CharBlock(width, heads) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 96)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Workload:
    """A model by name, and its batch: (images, pixels a side), or (texts, characters), on the CPU and on a GPU."""

    model: str
    on_cpu: tuple[int, int]
    on_gpu: tuple[int, int]

    def build(self, device: str) -> nn.Module:
        """The model in training mode, on a GPU in channels-last layout."""
        torch.manual_seed(0)
        size = (self.on_gpu if device == "cuda" else self.on_cpu)[1]
        if self.model == "char12":
            model: nn.Module = CharTransformer(tokens=size)
        elif self.model == "timm:vit_base_patch16_224":
            import timm

            model = timm.create_model("vit_base_patch16_224", img_size=size)
        else:
            model = models.build(self.model)
        model.train()
        return model.to(device, memory_format=torch.channels_last) if device == "cuda" else model  # type: ignore[call-overload]

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Random inputs and classes."""
        generator = torch.Generator().manual_seed(1)
        count, size = self.on_gpu if device == "cuda" else self.on_cpu
        if self.model == "char12":
            text = torch.randint(0, 96, (count, size + 1), generator=generator).to(device)
            return text[:, :-1], text[:, 1:].flatten()
        images = torch.randn(count, 3, size, size, generator=generator).to(device)
        if device == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.randint(0, 10, (count,), generator=generator).to(device)


WORKLOADS = {
    workload.model.removeprefix("timm:"): workload
    for workload in (
        Workload("2c2d", (128, 32), (1024, 32)),
        Workload("timm:resnet18", (16, 128), (128, 224)),
        Workload("timm:resnet50", (8, 128), (128, 224)),
        Workload("timm:efficientnet_b0", (8, 128), (128, 224)),
        Workload("timm:convnext_tiny", (4, 128), (128, 224)),
        Workload("char12", (16, 128), (64, 512)),
        Workload("timm:vit_base_patch16_224", (8, 224), (128, 224)),
    )
}
