"""Models as people write them, each small: what their repositories hold, with the habits that make surgery hard."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

USERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {}


def user(*shapes: tuple[int, ...]) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a model, with the shapes of its inputs."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        USERS[cls.__name__] = (cls, lambda: tuple(torch.randn(shape) for shape in shapes))
        return cls

    return enter


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


@user((5, 3), (5, 3))
class NeRF(nn.Module):
    """Positional encoding, and the input concatenated again half way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(4))
        self.skips = [2]
        self.pts = nn.ModuleList([nn.Linear(27, 16)] + [nn.Linear(16 + 27 * (i in self.skips), 16) for i in (1, 2, 3)])
        self.alpha, self.feature = nn.Linear(16, 1), nn.Linear(16, 16)
        self.views, self.rgb = nn.Linear(16 + 27, 8), nn.Linear(8, 3)

    def encode(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * self.bands).flatten(-2)
        return torch.cat([x, angles.sin(), angles.cos()], -1)

    def forward(self, points: Tensor, directions: Tensor) -> Tensor:
        p = h = self.encode(points)
        for i, layer in enumerate(self.pts):
            h = F.relu(layer(h))
            if i + 1 in self.skips:
                h = torch.cat([p, h], -1)
        alpha = F.softplus(self.alpha(h))
        h = F.relu(self.views(torch.cat([self.feature(h), self.encode(directions)], -1)))
        return torch.cat([torch.sigmoid(self.rgb(h)), alpha], -1)


class Sine(nn.Module):
    """SIREN's activation, in a module with its weights."""

    def __init__(self, cin: int, cout: int, omega: float = 30.0) -> None:
        super().__init__()
        self.omega, self.linear = omega, nn.Linear(cin, cout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


@user((4, 2))
class Siren(nn.Module):
    """Sine layers and a tanh at the end; coordinates get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Sine(2, 16), Sine(16, 16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, coords: Tensor) -> dict[str, Tensor]:
        coords = coords.clone().requires_grad_(True)
        return {"model_in": coords, "model_out": self.net(coords)}


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


@user((2, 5, 8))
class MixtureOfExperts(nn.Module):
    """Routing by indices: a loop over experts that a graph can't hold; the activation is a callable of the expert."""

    class Expert(nn.Module):
        """A gated expert whose dtype branch does not trace."""

        def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False), nn.Linear(8, 16)
            self.act_fn = act

        def forward(self, x: Tensor) -> Tensor:
            h = self.act_fn(self.w1(x)) * self.w3(x)
            if h.dtype != self.w2.weight.dtype:
                h = h.to(self.w2.weight.dtype)
            return self.w2(h)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        acts = [F.silu, F.gelu, functools.partial(F.gelu, approximate="tanh"), torch.tanh]
        self.gate, self.experts = nn.Linear(8, 4, bias=False), nn.ModuleList(map(self.Expert, acts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, dim = x.shape
        flat = x.reshape(-1, dim)
        logits = self.gate(flat)
        weights, chosen = torch.topk(logits.softmax(-1), 2)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.reshape(batch, length, dim), logits


@user((2, 3, 16, 16))
class Detr(nn.Module):
    """Backbone, nn.Transformer, learned queries, two heads and a dict."""

    class Mlp(nn.Module):
        """relu on all but the last layer."""

        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.num_layers = len(sizes) - 1
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

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


@user((6, 4))
class GraphNet(nn.Module):
    """Messages along edges, summed by scatter; the edges are a buffer."""

    class Layer(nn.Module):
        """One round of messages."""

        def __init__(self) -> None:
            super().__init__()
            self.message, self.update = nn.Linear(8, 8), nn.Linear(12, 4)
            self.aggregate = {"add": torch.Tensor.index_add}

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            source, target = edges[0], edges[1]
            m = F.elu(self.message(torch.cat([x[source], x[target]], -1)))
            total = torch.zeros(x.size(0), 8, dtype=x.dtype).index_add_(0, target, m)
            return x + torch.tanh(self.update(torch.cat([x, total], -1)))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]]))
        self.layers = nn.ModuleList([self.Layer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.edges)
        return x.mean(0)


@user((2, 1, 24))
class WaveNet(nn.Module):
    """Dilated causal convolutions with tanh and sigmoid gates, residual and skip outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.filters = nn.ModuleList([nn.Conv1d(8, 8, 2, dilation=2**i) for i in range(3)])
        self.gates = nn.ModuleList([nn.Conv1d(8, 8, 2, dilation=2**i) for i in range(3)])
        self.residuals = nn.ModuleList([nn.Conv1d(8, 8, 1) for _ in range(3)])
        self.skips = nn.ModuleList([nn.Conv1d(8, 8, 1) for _ in range(3)])
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.start(x), 0
        for f, g, r, s in zip(self.filters, self.gates, self.residuals, self.skips, strict=True):
            h = torch.tanh(f(x)) * torch.sigmoid(g(x))
            skip = s(h)[..., -10:] + skip
            x = r(h) + x[..., -h.shape[-1] :]
        return self.end(skip)  # type: ignore[no-any-return]


class Chomp(nn.Module):
    """Cuts the padding at the end."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


@user((2, 3, 12))
class TemporalConvNet(nn.Module):
    """Weight norm, chomp, dropout, and one ReLU called on the sum."""

    class Block(nn.Module):
        """The sequential `net` shares its modules with attributes of the block."""

        def __init__(self, cin: int, cout: int, dilation: int) -> None:
            super().__init__()
            wn = parametrizations.weight_norm
            self.conv1 = wn(nn.Conv1d(cin, cout, 3, padding=2 * dilation, dilation=dilation))
            self.conv2 = wn(nn.Conv1d(cout, cout, 3, padding=2 * dilation, dilation=dilation))
            self.chomp1, self.chomp2, self.relu1, self.relu2 = Chomp(2 * dilation), Chomp(2 * dilation), nn.ReLU(), nn.ReLU()
            self.dropout = nn.Dropout(0.1)
            self.net = nn.Sequential(
                self.conv1, self.chomp1, self.relu1, self.dropout, self.conv2, self.chomp2, self.relu2, self.dropout
            )
            self.downsample = nn.Conv1d(cin, cout, 1) if cin != cout else None
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x)
            return self.relu(out + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(self.Block(3, 8, 1), self.Block(8, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, :, -1]  # type: ignore[no-any-return]


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


@user((6, 4))
class RealNVP(nn.Module):
    """Coupling layers with a mask buffer, and a direction chosen by a method's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0]]))
        make = lambda last: nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 4), *last)  # noqa: E731
        self.s, self.t = (nn.ModuleList([make(last()) for _ in range(2)]) for last in (lambda: [nn.Tanh()], list))

    def inverse(self, z: Tensor) -> Tensor:
        for i in range(len(self.t)):
            kept = z * self.mask[i]
            z = kept + (1 - self.mask[i]) * (z * torch.exp(self.s[i](kept)) + self.t[i](kept))
        return z

    def forward(self, x: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        if reverse:
            return self.inverse(x), x.new_zeros(x.shape[0])
        log_det = x.new_zeros(x.shape[0])
        for i in reversed(range(len(self.t))):
            kept = self.mask[i] * x
            s, t = self.s[i](kept) * (1 - self.mask[i]), self.t[i](kept) * (1 - self.mask[i])
            x = (1 - self.mask[i]) * (x - t) * torch.exp(-s) + kept
            log_det = log_det - s.sum(1)
        return x, log_det


@user((4, 3))
class NeuralOde(nn.Module):
    """A solver that takes the right-hand side as a function; the step is refined while the error is large."""

    class Field(nn.Module):
        """dx/dt, counting its own calls as such code does."""

        def __init__(self) -> None:
            super().__init__()
            self.nfe, self.fc1, self.fc2, self.act = 0, nn.Linear(4, 8), nn.Linear(8, 3), nn.Softplus()

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            self.nfe += 1
            return self.fc2(self.act(self.fc1(torch.cat([x, t.expand(x.shape[0], 1)], 1))))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.field = self.Field()

    def forward(self, x: Tensor) -> Tensor:
        t, h = torch.zeros(1), 0.5
        while float(t) < 1:
            k1 = self.field(t, x)
            k2 = self.field(t + h, x + h * k1)
            if float((k1 - k2).detach().abs().max()) * h > 5 and h > 0.1:
                h /= 2
                continue
            x, t = x + h * (k1 + k2) / 2, t + h
        return x


@user((2, 6, 8))
class Mamba(nn.Module):
    """Selective scan: a loop over time by shape, SiLU gates, softplus of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.n = 16, 4
        self.in_proj, self.conv = nn.Linear(8, 32, bias=False), nn.Conv1d(16, 16, 3, groups=16, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(16, 9, bias=False), nn.Linear(1, 16)
        self.A_log, self.D = nn.Parameter(torch.rand(16, 4)), nn.Parameter(torch.ones(16))
        self.out_proj, self.activation = nn.Linear(16, 8, bias=False), "silu"
        self.act = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.act(self.conv(x.transpose(1, 2))[..., : hidden.shape[1]]).transpose(1, 2)
        dt, b, c = torch.split(self.x_proj(x), [1, self.n, self.n], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        a = torch.exp(dt[..., None] * -torch.exp(self.A_log.float()))
        state, outs = torch.zeros(x.shape[0], self.d, self.n), []
        for i in range(x.shape[1]):
            state = a[:, i] * state + (dt[:, i, :, None] * b[:, i, None]) * x[:, i, :, None]
            outs.append((state * c[:, i, None]).sum(-1))
        y = torch.stack(outs, 1) + x * self.D
        return self.out_proj(y * F.silu(z))  # type: ignore[no-any-return]


@user((2, 5, 8))
class Rwkv(nn.Module):
    """Token shift, squared ReLU, sigmoid receptance; a state dict handed through the blocks."""

    class ChannelMix(nn.Module):
        """relu squared, gated."""

        def __init__(self) -> None:
            super().__init__()
            self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
            self.mix = nn.Parameter(torch.rand(1, 1, 8))
            self.key, self.receptance, self.value = (nn.Linear(*s, bias=False) for s in ((8, 16), (8, 8), (16, 8)))

        def forward(self, x: Tensor, state: dict[str, Any]) -> Tensor:
            shifted = self.time_shift(x)
            k = torch.square(torch.relu(self.key(x * self.mix + shifted * (1 - self.mix))))
            scale = state["scale"] if state["rescale"] else 1.0
            return torch.sigmoid(self.receptance(x)) * self.value(k) * scale

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(2)])
        self.mixes = nn.ModuleList([self.ChannelMix() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for i, (norm, mix) in enumerate(zip(self.norms, self.mixes, strict=True)):
            x = x + mix(norm(x), {"scale": 0.5, "rescale": i > 0, "first": x})
        return x


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


@user((4, 12))
class SparseAutoencoder(nn.Module):
    """Tied decoder, a bias taken off first, top-k as a callable held beside a ReLU; losses in a NamedTuple."""

    class Out(NamedTuple):
        """What it returns."""

        decoded: Tensor
        latents: Tensor
        loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.pre_bias, self.latent_bias = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(24))
        self.encoder, self.activation = nn.Linear(12, 24, bias=False), nn.ReLU()
        self.postact: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, x: Tensor) -> Out:
        z = self.encoder(x - self.pre_bias) + self.latent_bias
        values, index = torch.topk(self.postact(z), 6, dim=-1)
        latents = torch.zeros_like(z).scatter(-1, index, values)
        decoded = self.activation(latents) @ self.encoder.weight + self.pre_bias
        return self.Out(decoded, latents, (decoded - x).pow(2).mean())


@user((3, 5, 6))
class RecurrentPolicy(nn.Module):
    """Encoder, LSTM, GRU cell in a loop, and two heads over one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lstm = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.LSTM(8, 8, batch_first=True)
        self.cell, self.policy, self.value = nn.GRUCell(8, 8), nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Any, Tensor, Tensor]:
        h, state = self.lstm(self.encoder(x), state)
        out = h.new_zeros(h.shape[0], 8)
        for step in h.unbind(1):
            out = self.cell(step, out)
        out = F.elu(out)
        return torch.distributions.Categorical(logits=self.policy(out)).logits, self.value(out), state[0]


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
        b, c, height, width = h.shape
        coords = 2 * math.pi * ((2 * points - 1) @ self.gaussian)
        prompts = torch.cat([torch.sin(coords), torch.cos(coords)], dim=-1)
        tokens = torch.cat([self.tokens.weight.unsqueeze(0).expand(points.size(0), -1, -1), prompts], dim=1)
        tokens, weights = self.attend(tokens, h.flatten(2).mT, h.flatten(2).mT, need_weights=True)
        up = self.up(h)
        hyper = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(self.hyper)], 1)
        return (hyper @ up.flatten(2)).view(b, -1, *up.shape[2:]), weights


@user((2, 7))
class LanguageModel(nn.Module):
    """Token indices made of the input, rotary caches filled on first use, causal mask of -inf, tied head, checkpoints."""

    class Block(nn.Module):
        """Pre-norm attention and a gated MLP."""

        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2, self.qkv, self.out = nn.RMSNorm(8), nn.RMSNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = {"swish": F.silu, "gelu": F.gelu}["swish"]
            self._cached: Tensor | None = None

        def angles(self, length: int) -> Tensor:
            if self._cached is None or len(self._cached) < length:
                self._cached = torch.outer(torch.arange(length).float(), 1 / 10 ** torch.arange(8).float())
            return self._cached[:length]

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
            angles = self.angles(x.shape[1])
            q, k = q * angles.cos(), k * angles.cos()
            x = x + self.out((q @ k.mT / 3 + mask).softmax(-1) @ v)
            h = self.n2(x)
            return x + self.down(self.act_fn(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 8), nn.ModuleList([self.Block() for _ in range(2)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gradient_checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.abs().mul(3).long().clamp(max=10)
        h = self.embed(tokens)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                h = checkpoint(block, h, mask, use_reentrant=False)
            else:
                h = block(h, mask)
        return self.head(h)  # type: ignore[no-any-return]


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


@user((3, 6))
class Maml(nn.Module):
    """A functional inner step: torch.func.functional_call on its own child with fast weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        fast = {name: p - 0.1 * p.sign() for name, p in self.net.named_parameters() if not name.startswith("delta")}
        return torch.func.functional_call(self.net, fast, (x,))  # type: ignore[no-any-return]


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


@user((4, 5))
class VariationalAutoencoder(nn.Module):
    """Reparametrised in training mode, the mean in eval mode; a class attribute holds the nonlinearity."""

    nonlinearity = staticmethod(F.leaky_relu)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mu, self.logvar = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.fc3, self.fc4 = nn.Linear(2, 8), nn.Linear(8, 5)

    def reparametrise(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if self.training:
            return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return mu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.nonlinearity(self.fc1(x), 0.1)
        mu, logvar = self.mu(h), self.logvar(h)
        z = self.reparametrise(mu, logvar)
        return torch.sigmoid(self.fc4(self.nonlinearity(self.fc3(z)))), mu, logvar


@user((2, 4, 16))
class EarlyExit(nn.Module):
    """Leaves when it is sure, so its forward has no graph; what it calls is held in a tuple and as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.activation, self.squash = functools.partial(F.leaky_relu, negative_slope=0.2), lambda z: torch.tanh(z) * 2

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.activation(layer(x))
            if float(x.detach().abs().max()) > 1e6:
                return x
        return self.squash(x)  # type: ignore[no-any-return]
