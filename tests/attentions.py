"""Self-attention in the forms in which models write it: (batch, tokens, channels) in and out, with two heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEADS = 2


class Attention(nn.Module):
    """One projection for queries, keys and values, split by a reshape, as in most vision transformers."""

    def __init__(self, channels: int = 8, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(channels, 3 * channels, bias), nn.Linear(channels, channels)
        self.drop, self.head = nn.Dropout(dropout), channels // HEADS

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, self.head).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.split(x)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, HEADS * self.head))  # type: ignore[no-any-return]


class Product(Attention):
    """The weights written out, with a dropout on them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        weights = self.drop((q * self.head**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class KeysUnbiased(Attention):
    """Queries and values have biases, and zeros stand between them for the keys, as in BEiT and Swin V2."""

    def __init__(self, channels: int = 8, bias: bool = True) -> None:
        super().__init__(channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias), dim=0)
        split = F.linear(x, self.qkv.weight, bias).reshape(*x.shape[:2], 3, HEADS, self.head)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        return q, k, v


class Interleaved(Attention):
    """The projection's outputs lie by head: q, k, v of the first, then of the second."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, HEADS, 3 * self.head).transpose(1, 2).chunk(3, dim=-1)
        return q, k, v


class Separate(nn.Module):
    """Three projections; the values come from one head that both heads of queries share; batch and heads are one axis."""

    def __init__(self, channels: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(channels, channels, bias), nn.Linear(channels, channels // HEADS, bias)
        self.v, self.out = nn.Linear(channels, channels // HEADS, bias), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.size()
        head = channels // HEADS
        q = self.q(x).view(batch, tokens, HEADS, head).transpose(1, 2).reshape(batch * HEADS, tokens, head)
        k, v = (
            y.unsqueeze(1).expand(batch, HEADS, tokens, head).reshape(-1, tokens, head) for y in (self.k(x), self.v(x))
        )
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(head), dim=-1)
        mixed = torch.bmm(weights, v).view(batch, HEADS, tokens, head).transpose(1, 2)
        return self.out(mixed.reshape(batch, tokens, channels))  # type: ignore[no-any-return]


class Einsum(Attention):
    """Heads behind the tokens, mixed by einsum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, self.head)).unbind(2)
        weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))  # type: ignore[no-any-return]


class Rearranged(Attention):
    """The heads are split and joined by einops."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=HEADS) for y in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2)).softmax(dim=-1)
        return self.proj(rearrange(weights @ v, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class CrossCovariance(Attention):
    """Channels are mixed, and not tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(-2, -1) for y in self.split(x))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).flatten(2))  # type: ignore[no-any-return]


class Convolutional(nn.Module):
    """A 1×1 convolution projects; the tokens are positions along the last axis."""

    def __init__(self, channels: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv1d(channels, 3 * channels, 1, bias=bias), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.transpose(1, 2)).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return self.proj((weights @ v.transpose(1, 2)).transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class Multihead(nn.Module):
    """torch's own module, whose forward has no graph."""

    def __init__(self, channels: int = 8, bias: bool = True, need_weights: bool = True) -> None:
        super().__init__()
        self.attn, self.need_weights = nn.MultiheadAttention(channels, HEADS, bias=bias, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=self.need_weights)[0]  # type: ignore[no-any-return]


class Parted(nn.Module):
    """The output projection stands in another module, as in BERT."""

    class Inner(Attention):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            q, k, v = self.split(x)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None

    class Output(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.dense, self.norm = nn.Linear(channels, channels), nn.LayerNorm(channels)

        def forward(self, mixed: Tensor, x: Tensor) -> Tensor:
            return self.norm(self.dense(mixed) + x)  # type: ignore[no-any-return]

    def __init__(self, channels: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.inner, self.output = self.Inner(channels, bias), self.Output(channels)
        self.inner.proj = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(x)[0], x)  # type: ignore[no-any-return]


ATTENTIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        Attention, Product, KeysUnbiased, Interleaved, Separate, Einsum, Rearranged, CrossCovariance, Convolutional,
        Multihead, Parted,
    )
}  # fmt: skip
