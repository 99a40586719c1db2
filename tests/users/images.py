"""Users whose inputs are images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .registry import user


class TimeResBlock(nn.Module):
    """A diffusion UNet's block: norm, nonlinearity held as a callable, time embedding added or scaling and shifting."""

    def __init__(self, cin: int, cout: int, act: Callable[[Tensor], Tensor], scale_shift: bool = False) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.time = nn.Linear(8, 2 * cout if scale_shift else cout)
        self.norm2, self.conv2 = nn.GroupNorm(2, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else None
        self.nonlinearity, self.scale_shift = act, scale_shift

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        if temb is not None:
            t = self.time(self.nonlinearity(temb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = torch.chunk(t, 2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + t)
        h = self.conv2(self.nonlinearity(h))
        if self.skip is not None:
            x = self.skip(x)
        return (x + h) / math.sqrt(2.0)


@user((2, 3, 16, 16), (2,))
class DiffusionUNet(nn.Module):
    """Down, middle, up with skips popped from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.embed = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.down = nn.ModuleList([TimeResBlock(8, 8, F.silu), TimeResBlock(8, 16, F.silu, True)])
        self.up = nn.ModuleList([TimeResBlock(32, 8, F.gelu), TimeResBlock(16, 8, F.gelu)])
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = torch.arange(4, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-half)[None]
        temb = self.embed(torch.cat([angles.sin(), angles.cos()], dim=-1))
        h, skips = self.stem(x), []
        for block in self.down:
            h = block(h, temb)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        for block in self.up:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = block(torch.cat([h, skips.pop()], dim=1), temb)
        return self.out(h)  # type: ignore[no-any-return]


@user((4, 3, 16, 16))
class SpectralDiscriminator(nn.Module):
    """A GAN's critic with spectral norm, leaky ReLUs in place, and mini-batch deviation."""

    def __init__(self) -> None:
        super().__init__()
        sn = parametrizations.spectral_norm
        self.main = nn.Sequential(
            sn(nn.Conv2d(3, 8, 4, 2, 1, bias=False)), nn.LeakyReLU(0.2, inplace=True),
            sn(nn.Conv2d(8, 16, 4, 2, 1, bias=False)), nn.InstanceNorm2d(16, affine=True), nn.LeakyReLU(0.2, inplace=True),
        )  # fmt: skip
        self.head = sn(nn.Linear(17 * 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.main(x)
        deviation = h.std(0, unbiased=False).mean().expand(h.shape[0], 1, *h.shape[2:])
        return self.head(torch.cat([h, deviation], 1).flatten(1)).squeeze(-1)  # type: ignore[no-any-return]


@user((2, 3, 16, 16))
class Detr(nn.Module):
    """Backbone, nn.Transformer, learned queries, two heads and a dict."""

    class Mlp(nn.Module):
        """relu on all but the last layer."""

        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.num_layers = len(sizes) - 1
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = F.relu(layer(x)) if i < self.num_layers - 1 else layer(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.1, batch_first=True)
        self.queries, self.position = nn.Parameter(torch.rand(3, 8)), nn.Parameter(torch.rand(16, 8))
        self.classes, self.boxes = nn.Linear(8, 5), self.Mlp(8, 8, 8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.backbone(x).flatten(2).permute(0, 2, 1)
        h = self.transformer(h + self.position, self.queries.unsqueeze(0).repeat(h.shape[0], 1, 1))
        return {"logits": self.classes(h), "boxes": self.boxes(h).sigmoid()}


@user((2, 3, 16, 16))
class MobileViTBlock(nn.Module):
    """Convolution, patches unfolded into tokens, a transformer layer, folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.fuse = nn.Sequential(nn.Conv2d(16, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.local(x)
        b, c, height, width = h.shape
        tokens = h.reshape(b, c, height // 2, 2, width // 2, 2).permute(0, 3, 5, 2, 4, 1)
        tokens = tokens.reshape(b * 4, -1, c)
        tokens = self.layer(tokens).reshape(b, 2, 2, height // 2, width // 2, c).permute(0, 5, 3, 1, 4, 2)
        return self.fuse(torch.cat([h, tokens.reshape(b, c, height, width)], 1))  # type: ignore[no-any-return]


@user((1, 1, 28, 28))
class CroppingUNet(nn.Module):
    """Valid convolutions; the skip is cropped to whatever size came back."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
        self.mid = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.dec = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 1, 1))

    @staticmethod
    def crop(x: Tensor, like: Tensor) -> Tensor:
        dy, dx = (x.size(2) - like.size(2)) // 2, (x.size(3) - like.size(3)) // 2
        return x[:, :, dy : dy + like.size(2), dx : dx + like.size(3)]

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc(x)
        h = self.up(self.mid(F.max_pool2d(skip, 2)))
        return self.dec(torch.cat([h, self.crop(skip, h)], 1))  # type: ignore[no-any-return]


@user((2, 3, 16, 16))
class MlpMixer(nn.Module):
    """Mixing tokens through a transpose around the MLP."""

    class Block(nn.Module):
        """Two MLPs; the first one sees the tokens as channels."""

        def __init__(self) -> None:
            super().__init__()
            mlp = lambda n: nn.Sequential(nn.Linear(n, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, n))  # noqa: E731
            self.norm1, self.norm2, self.tokens, self.channels = nn.LayerNorm(8), nn.LayerNorm(8), mlp(16), mlp(8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(self.Block(), self.Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).mT).mean(dim=1))  # type: ignore[no-any-return]


@user((2, 8, 8, 8))
class SwinBlock(nn.Module):
    """Windows shifted by a roll, with a mask of -100 made from the size."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.shift = 4, 2
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.register_buffer("mask", self.make_mask(8, 8), persistent=False)

    def windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, c)

    def make_mask(self, height: int, width: int) -> Tensor:
        regions = torch.zeros(1, height, width, 1)
        parts = (slice(0, -4), slice(-4, -2), slice(-2, None))
        for i, rows in enumerate(parts):
            for j, columns in enumerate(parts):
                regions[:, rows, columns, :] = 3 * i + j
        marks = self.windows(regions).squeeze(-1)
        return (marks[:, None] - marks[:, :, None]).ne(0).float() * -100.0

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift > 0 else self.norm1(x)
        q, k, v = self.qkv(self.windows(y)).unflatten(-1, (3, c)).unbind(-2)
        scores = (q @ k.mT) / c**0.5
        scores = scores.view(b, -1, *scores.shape[1:]) + self.mask
        y = self.proj(scores.flatten(0, 1).softmax(-1) @ v)
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


@user((2, 1, 12, 12))
class CapsuleNet(nn.Module):
    """Squash, and routing by agreement in a loop of fixed length with detached predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.primary = nn.Conv2d(1, 8, 5), nn.Conv2d(8, 8, 5, 2)
        self.route = nn.Parameter(torch.randn(3, 8, 4, 6) * 0.1)
        self.decoder = nn.Sequential(nn.Linear(18, 16), nn.ReLU(inplace=True), nn.Linear(16, 144), nn.Sigmoid())

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        norm = (x**2).sum(-1, keepdim=True)
        return norm / (1 + norm) * x / (norm + 1e-8).sqrt()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.conv(x), inplace=True)
        u = self.squash(self.primary(h).view(x.size(0), 8, 4))
        votes = torch.einsum("bid,oidk->boik", u, self.route)
        logits = torch.zeros_like(votes[..., 0])
        for step in range(3):
            v = self.squash((logits.softmax(1)[..., None] * votes).sum(2))
            if step < 2:
                logits = logits + (votes * v[:, :, None]).sum(-1).detach()
        return v.norm(dim=-1), self.decoder(v.flatten(1))


@user((4, 4, 20, 20))
class DuelingDqn(nn.Module):
    """Bytes scaled in place, a shared trunk, advantage and value; the flattened size is found by a dry run."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 8, 4, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        with torch.no_grad():
            size = self.features(torch.zeros(1, 4, 20, 20)).numel()
        self.advantage = nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, 3))
        self.value = nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float().clone()
        x /= 255.0
        h = self.features(x).view(x.size(0), -1)
        advantage = self.advantage(h)
        return self.value(h) + advantage - advantage.mean(1, keepdim=True)  # type: ignore[no-any-return]


@user((1, 3, 16, 16), (1, 2, 2))
class PromptedSegmenter(nn.Module):
    """Image encoder, prompt encoder with a Gaussian buffer, two-way attention, and hypernetwork masks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 1))
        self.register_buffer("gaussian", torch.randn(2, 4))
        self.tokens = nn.Embedding(2, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2), nn.GELU())
        self.hyper = nn.ModuleList([Detr.Mlp(8, 8, 4) for _ in range(2)])

    def forward(self, image: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(image)
        b = h.shape[0]
        coords = 2 * math.pi * ((2 * points - 1) @ self.gaussian)
        prompts = torch.cat([torch.sin(coords), torch.cos(coords)], dim=-1)
        tokens = torch.cat([self.tokens.weight.unsqueeze(0).expand(points.size(0), -1, -1), prompts], dim=1)
        tokens, weights = self.attend(tokens, h.flatten(2).mT, h.flatten(2).mT, need_weights=True)
        up = self.up(h)
        hyper = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(self.hyper)], 1)
        return (hyper @ up.flatten(2)).view(b, -1, *up.shape[2:]), weights


@user((2, 3, 8, 8))
class SqueezeExcite(nn.Module):
    """Gates made by functions that the constructor was given, and a layer scale as a plain parameter."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, gate: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.act, self.gate, self.gamma = act(inplace=True), gate, nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv(x))
        s = x.mean((2, 3), keepdim=True)
        return x + x * self.gate(self.fc2(self.act(self.fc1(s)))) * self.gamma  # type: ignore[no-any-return]


@user((2, 3, 12, 12))
class ListOutputPyramid(nn.Module):
    """Features in a list of a Sequential's stages, laterals added top down, a dict comprehension at the end."""

    def __init__(self) -> None:
        super().__init__()
        stage = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU(True))  # noqa: E731
        self.stages = nn.Sequential(stage(3, 4), stage(4, 8))
        self.laterals = nn.ModuleDict({"p1": nn.Conv2d(4, 6, 1), "p2": nn.Conv2d(8, 6, 1)})
        self.smooth = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        tops = [lateral(f) for lateral, f in zip(self.laterals.values(), features, strict=True)]
        for i in range(len(tops) - 1, 0, -1):
            tops[i - 1] = tops[i - 1] + F.interpolate(tops[i], size=tops[i - 1].shape[-2:])
        return {name: F.relu6(self.smooth(top)) for name, top in zip(self.laterals, tops, strict=True)}
